/* Implements cudaMallocAsync and its stream-ordered pools. A pool keeps freed memory, up to its release threshold; heap.c
 * chooses where an allocation lies in it. Memory in use is counted to the byte, as the driver of an H200 counts it. */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "heap.h"

#include <string.h>

struct CUmemPoolHandle_st {
    int device;
    dry_heap heap;
    size_t used, used_high, reserved_high;
    uint64_t threshold;
    int settings[16];
};

static struct CUmemPoolHandle_st pools[DRY_MAX_DEVICES];

static cudaMemPool_t pool_of(int device) {
    pools[device].device = device;
    return &pools[device];
}

static void shrink(cudaMemPool_t pool, size_t keep) {
    size_t given = dry_heap_trim(&pool->heap, keep);
    if (given) dry_refund(pool->device, given);
}

static int take(cudaMemPool_t pool, size_t bytes, uintptr_t *address) {
    size_t more, place = dry_heap_place(&pool->heap, bytes, &more);
    if (place != 0 && more && !dry_has_room(pool->device, more)) {
        shrink(pool, 0); /* give back memory that is free elsewhere in the pool: it can be used here */
        place = dry_heap_place(&pool->heap, bytes, &more);
    }
    if (place == 0 || (more && !dry_charge(pool->device, more))) return cudaErrorMemoryAllocation;
    /* The program sees other addresses than the pool's own: there, each allocation has pages of its own. */
    dry_span span = {.kind = DRY_SPAN_POOL, .counted = bytes, .owner = (void *)place};
    *address = dry_space_take(pool->device, DRY_ROUND_UP(bytes, DRY_PAGE), DRY_PAGE, 0, span);
    if (*address == 0 || !dry_heap_take(&pool->heap, place, bytes)) {
        if (*address) dry_space_release(pool->device, *address, NULL);
        if (more) dry_refund(pool->device, more);
        return cudaErrorMemoryAllocation;
    }
    pool->used += bytes;
    if (pool->used > pool->used_high) pool->used_high = pool->used;
    if (pool->heap.reserved > pool->reserved_high) pool->reserved_high = pool->heap.reserved;
    return cudaSuccess;
}

/* Called with the lock held, by dry_free as well. */
int dry_pool_free(dry_span span) {
    cudaMemPool_t pool = pool_of(span.device);
    dry_forget(span.base, span.size);
    dry_space_release(span.device, span.base, NULL);
    dry_heap_give(&pool->heap, (size_t)span.owner);
    pool->used -= span.counted;
    if (pool->threshold < pool->heap.reserved) shrink(pool, pool->threshold);
    return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
    *pointer = NULL;
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (dry_is_capturing(stream))
        return dry_fail(dry_not_implemented("cudaMallocAsync inside a stream capture", cudaErrorNotSupported));
    if (bytes == 0) return cudaSuccess;
    if (bytes > dry_the_card()->total_bytes) {
        dry_lock();
        dry_charge(pool->device, bytes); /* counts the refusal */
        dry_unlock();
        return dry_fail(cudaErrorMemoryAllocation);
    }
    dry_note("cudaMallocAsync: how the driver's pool places allocations is a guess, so reserved bytes are one as well");
    uintptr_t address;
    dry_lock();
    int error = take(pool, bytes, &address);
    dry_unlock();
    if (error == cudaSuccess) *pointer = (void *)address;
    return dry_fail(error);
}

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    return cudaMallocFromPoolAsync(pointer, bytes, pool_of(device), stream);
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    if (dry_physical_index(device) < 0) return dry_fail(cudaErrorInvalidDevice);
    *pool = pool_of(device);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t *pool, int device) { return cudaDeviceGetDefaultMemPool(pool, device); }

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep) {
    dry_lock();
    shrink(pool, keep);
    dry_unlock();
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t count) {
    return (void)pool, (void)access, (void)count, cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    dry_lock();
    switch (attribute) {
    case cudaMemPoolAttrReleaseThreshold: *(uint64_t *)value = pool->threshold; break;
    case cudaMemPoolAttrReservedMemCurrent: *(uint64_t *)value = pool->heap.reserved; break;
    case cudaMemPoolAttrReservedMemHigh: *(uint64_t *)value = pool->reserved_high; break;
    case cudaMemPoolAttrUsedMemCurrent: *(uint64_t *)value = pool->used; break;
    case cudaMemPoolAttrUsedMemHigh: *(uint64_t *)value = pool->used_high; break;
    default: *(int *)value = (unsigned)attribute < 16 ? pool->settings[attribute] : 0;
    }
    dry_unlock();
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    dry_lock();
    switch (attribute) {
    case cudaMemPoolAttrReleaseThreshold: pool->threshold = *(uint64_t *)value; break;
    case cudaMemPoolAttrReservedMemHigh:
        pool->reserved_high = pool->heap.reserved;
        break; /* only zero is allowed: a reset */
    case cudaMemPoolAttrUsedMemHigh: pool->used_high = pool->used; break;
    default:
        if ((unsigned)attribute < 16) pool->settings[attribute] = *(int *)value;
    }
    dry_unlock();
    return cudaSuccess;
}
