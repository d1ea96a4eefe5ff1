/* Chooses where the driver's pool places an allocation, and computes how much memory the pool holds.
 *
 * The driver does not publish its rule. This one explains a run on an H200 (tests/truth, rows of many lengths) to 1%: a
 * pool is one range of addresses; an allocation takes the lowest free addresses that are long enough; free neighbours are
 * joined; and memory is mapped to the range in pieces of 32 MiB when it is first used. Best fit gives 1% less than was
 * measured, and a new piece for each allocation that finds no room gives 2% more.
 */
#include "dry.h"
#include "heap.h"

#include <stdlib.h>

#define GRAIN ((size_t)512)

/* One byte for each piece: whether memory is mapped to it. */
static int make_room(dry_heap *heap, size_t pieces) {
    if (pieces <= heap->count) return 1;
    size_t count = pieces > 2 * heap->count ? pieces : 2 * heap->count;
    uint8_t *backed = realloc(heap->backed, count);
    if (backed == NULL) return 0;
    for (size_t i = heap->count; i < count; i++) backed[i] = 0;
    heap->backed = backed;
    heap->count = count;
    return 1;
}

size_t dry_heap_trim(dry_heap *heap, size_t keep) {
    size_t before = heap->reserved;
    for (size_t piece = heap->count; piece-- > 0 && heap->reserved > keep;) {
        if (!heap->backed[piece] || dry_spans_overlap(&heap->taken, piece * DRY_HEAP_PIECE, DRY_HEAP_PIECE)) continue;
        heap->backed[piece] = 0;
        heap->reserved -= DRY_HEAP_PIECE;
    }
    return before - heap->reserved;
}

size_t dry_heap_place(dry_heap *heap, size_t bytes, size_t *more) {
    size_t size = DRY_ROUND_UP(bytes, GRAIN);
    /* The first piece is never used, because an address of 0 means "none". */
    size_t base = dry_spans_first_fit(&heap->taken, DRY_HEAP_PIECE, SIZE_MAX / 2, size, GRAIN);
    *more = 0;
    if (base == 0 || !make_room(heap, (base + size - 1) / DRY_HEAP_PIECE + 1)) return 0;
    for (size_t piece = base / DRY_HEAP_PIECE; piece <= (base + size - 1) / DRY_HEAP_PIECE; piece++)
        if (!heap->backed[piece]) *more += DRY_HEAP_PIECE;
    return base;
}

int dry_heap_take(dry_heap *heap, size_t base, size_t bytes) {
    size_t size = DRY_ROUND_UP(bytes, GRAIN);
    if (!dry_spans_insert(&heap->taken, (dry_span){.base = base, .size = size})) return 0;
    for (size_t piece = base / DRY_HEAP_PIECE; piece <= (base + size - 1) / DRY_HEAP_PIECE; piece++) {
        if (heap->backed[piece]) continue;
        heap->backed[piece] = 1;
        heap->reserved += DRY_HEAP_PIECE;
    }
    return 1;
}

void dry_heap_give(dry_heap *heap, size_t base) { dry_spans_remove(&heap->taken, base, NULL); }
