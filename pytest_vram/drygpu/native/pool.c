/* cudaMallocAsync: stream-ordered pools. How the driver carves up a pool is not published. Here a pool holds what is in
 * use, rounded up to the 32 MiB it grows by, and gives back what is above its release threshold when a stream
 * synchronizes: a lower bound, without the fragmentation of a real one. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <string.h>

enum { SPAN_POOL = 2 };
#define GROWTH ((size_t)32 << 20)
#define GRAIN ((size_t)512)

struct CUmemPoolHandle_st {
    int device;
    size_t used, used_high, reserved, reserved_high;
    uint64_t threshold;
    int settings[16];
};

static struct CUmemPoolHandle_st pools[DRY_MAX_DEVICES];

static cudaMemPool_t pool_of(int device) {
    pools[device].device = device;
    return &pools[device];
}

static void shrink(cudaMemPool_t pool, size_t keep) {
    size_t least = DRY_ROUND_UP(pool->used, GROWTH), target = DRY_ROUND_UP(keep, GROWTH);
    if (target < least) target = least;
    if (target >= pool->reserved) return;
    dry_refund(pool->device, pool->reserved - target);
    pool->reserved = target;
}

static int take(cudaMemPool_t pool, size_t bytes, uintptr_t *address) {
    size_t rounded = DRY_ROUND_UP(bytes, GRAIN), needed = DRY_ROUND_UP(pool->used + rounded, GROWTH);
    if (needed > pool->reserved) {
        size_t more = needed - pool->reserved;
        if (!dry_charge(pool->device, more)) return cudaErrorMemoryAllocation;
        pool->reserved = needed;
    }
    dry_span span = {.kind = SPAN_POOL, .counted = rounded, .owner = pool};
    *address = dry_space_take(pool->device, DRY_ROUND_UP(bytes, DRY_PAGE), DRY_PAGE, 0, span);
    if (*address == 0) return cudaErrorMemoryAllocation;
    pool->used += rounded;
    if (pool->used > pool->used_high) pool->used_high = pool->used;
    if (pool->reserved > pool->reserved_high) pool->reserved_high = pool->reserved;
    return cudaSuccess;
}

/* Called with the lock held, by dry_free as well. */
int dry_pool_free(dry_span span) {
    cudaMemPool_t pool = span.owner;
    dry_forget(span.base, span.size);
    dry_space_release(span.device, span.base, NULL);
    pool->used -= span.counted;
    if (pool->threshold < pool->reserved) shrink(pool, pool->threshold);
    return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
    *pointer = NULL;
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (dry_is_capturing(stream))
        return dry_fail(dry_not_implemented("cudaMallocAsync inside a stream capture", cudaErrorNotSupported));
    if (bytes == 0) return cudaSuccess;
    if (bytes > dry_the_card()->total_bytes) return dry_fail(cudaErrorMemoryAllocation);
    dry_note("cudaMallocAsync: the driver's pool is taken to have no fragmentation, so reserved bytes are a lower bound");
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

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return (void)stream, cudaFree(pointer); }

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
    case cudaMemPoolAttrReservedMemCurrent: *(uint64_t *)value = pool->reserved; break;
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
        pool->reserved_high = pool->reserved;
        break; /* only zero is allowed: a reset */
    case cudaMemPoolAttrUsedMemHigh: pool->used_high = pool->used; break;
    default:
        if ((unsigned)attribute < 16) pool->settings[attribute] = *(int *)value;
    }
    dry_unlock();
    return cudaSuccess;
}
