/* heap.c: the addresses of a pool, and the memory that is mapped to them */
#ifndef PYTEST_VRAM_HEAP_H
#define PYTEST_VRAM_HEAP_H

#include "dry.h"

#define DRY_HEAP_PIECE ((size_t)32 << 20)

typedef struct {
    dry_spans taken;
    uint8_t *backed; /* one byte for each of `count` pieces */
    size_t count, reserved;
} dry_heap;

size_t dry_heap_place(dry_heap *heap, size_t bytes, size_t *more); /* an address, or 0, and the bytes to be mapped */
int dry_heap_take(dry_heap *heap, size_t base, size_t bytes);      /* at an address that dry_heap_place returned */
void dry_heap_give(dry_heap *heap, size_t base);
size_t dry_heap_trim(dry_heap *heap, size_t keep); /* returns the bytes that it gave back */

#endif
