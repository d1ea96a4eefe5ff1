/* Sorted, non-overlapping address ranges, used for allocations, mappings and registered host memory. */
#include "dry.h"

#include <stdlib.h>
#include <string.h>

/* Index of the first span whose base is above the address. */
static size_t upper_bound(const dry_spans *spans, uintptr_t address) {
    size_t low = 0, high = spans->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (spans->items[middle].base <= address) low = middle + 1;
        else high = middle;
    }
    return low;
}

dry_span *dry_spans_find(const dry_spans *spans, uintptr_t address) {
    size_t index = upper_bound(spans, address);
    if (index == 0) return NULL;
    dry_span *span = &spans->items[index - 1];
    return address - span->base < span->size ? span : NULL;
}

int dry_spans_overlap(const dry_spans *spans, uintptr_t base, size_t size) {
    if (dry_spans_find(spans, base) != NULL) return 1;
    size_t next = upper_bound(spans, base);
    return next < spans->count && spans->items[next].base - base < size;
}

int dry_spans_insert(dry_spans *spans, dry_span span) {
    if (spans->count == spans->capacity) {
        size_t capacity = spans->capacity ? 2 * spans->capacity : 64;
        dry_span *items = realloc(spans->items, capacity * sizeof *items);
        if (items == NULL) return 0;
        spans->items = items;
        spans->capacity = capacity;
    }
    size_t index = upper_bound(spans, span.base);
    memmove(&spans->items[index + 1], &spans->items[index], (spans->count - index) * sizeof span);
    spans->items[index] = span;
    spans->count++;
    return 1;
}

int dry_spans_remove(dry_spans *spans, uintptr_t base, dry_span *removed) {
    size_t index = upper_bound(spans, base);
    if (index == 0 || spans->items[index - 1].base != base) return 0;
    if (removed != NULL) *removed = spans->items[index - 1];
    memmove(&spans->items[index - 1], &spans->items[index], (spans->count - index) * sizeof *removed);
    spans->count--;
    return 1;
}

/* Returns the lowest address with room. PyTorch's allocator orders equal blocks by address, so runs are repeatable. */
uintptr_t dry_spans_first_fit(const dry_spans *spans, uintptr_t low, uintptr_t high, size_t size, size_t align) {
    uintptr_t candidate = DRY_ROUND_UP(low, align);
    for (size_t i = 0; i < spans->count; i++) {
        const dry_span *span = &spans->items[i];
        if (span->base >= candidate && span->base - candidate >= size) break;
        if (span->base + span->size > candidate) candidate = DRY_ROUND_UP(span->base + span->size, align);
    }
    return candidate + size <= high && candidate + size > candidate ? candidate : 0;
}

/* The highest address between `low` and `high` where `size` bytes are free, or 0. */
uintptr_t dry_spans_last_fit(const dry_spans *spans, uintptr_t low, uintptr_t high, size_t size, size_t align) {
    uintptr_t top = high;
    for (size_t i = spans->count + 1; i-- > 0;) {
        uintptr_t bottom = i > 0 ? spans->items[i - 1].base + spans->items[i - 1].size : low;
        if (bottom < low) bottom = low;
        if (top > bottom && top - bottom >= size) {
            uintptr_t base = (top - size) / align * align;
            if (base >= bottom) return base;
        }
        if (bottom == low) return 0;
        top = spans->items[i - 1].base < high ? spans->items[i - 1].base : high;
    }
    return 0;
}
