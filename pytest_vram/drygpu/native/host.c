/* Pinned host memory is ordinary memory of the process, which is counted here. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <sys/mman.h>
#include <unistd.h>

enum { HOST_ALLOCATED = 2, HOST_REGISTERED = 1 };

static dry_spans pinned;

int dry_host_find(const void *pointer, void **base, size_t *size) {
    dry_span *span = dry_spans_find(&pinned, (uintptr_t)pointer);
    if (span == NULL) return 0;
    *base = (void *)span->base;
    *size = span->size;
    return span->kind;
}

int dry_host_alloc(size_t bytes, void **pointer) {
    *pointer = NULL;
    if (bytes == 0) return cudaSuccess;
    size_t rounded = DRY_ROUND_UP(bytes, (size_t)sysconf(_SC_PAGESIZE));
    void *got = dry_map_host(rounded);
    if (got == NULL) return cudaErrorMemoryAllocation;
    dry_lock();
    dry_spans_insert(&pinned,
                     (dry_span){.base = (uintptr_t)got, .size = rounded, .counted = bytes, .kind = HOST_ALLOCATED});
    dry_charge_host(bytes);
    dry_unlock();
    *pointer = got;
    return cudaSuccess;
}

int dry_host_free(void *pointer) {
    if (pointer == NULL) return cudaSuccess;
    dry_lock();
    dry_span *found = dry_spans_find(&pinned, (uintptr_t)pointer), span;
    int ok = found != NULL && found->base == (uintptr_t)pointer && found->kind == HOST_ALLOCATED;
    if (ok) {
        dry_spans_remove(&pinned, found->base, &span);
        dry_refund_host(span.counted);
        munmap(pointer, span.size);
    }
    dry_unlock();
    return ok ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    (void)flags;
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    return dry_fail(dry_host_alloc(bytes, pointer));
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
cudaError_t cudaFreeHost(void *pointer) { return dry_fail(dry_host_free(pointer)); }

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
    (void)flags;
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (pointer == NULL || bytes == 0) return dry_fail(cudaErrorInvalidValue);
    dry_lock();
    int free_range = dry_spans_find(&pinned, (uintptr_t)pointer) == NULL;
    if (free_range) {
        dry_spans_insert(
            &pinned, (dry_span){.base = (uintptr_t)pointer, .size = bytes, .counted = bytes, .kind = HOST_REGISTERED});
        dry_charge_host(bytes);
    }
    dry_unlock();
    return dry_fail(free_range ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered);
}

cudaError_t cudaHostUnregister(void *pointer) {
    dry_lock();
    dry_span *found = dry_spans_find(&pinned, (uintptr_t)pointer), span;
    int ok = found != NULL && found->base == (uintptr_t)pointer && found->kind == HOST_REGISTERED;
    if (ok) {
        dry_spans_remove(&pinned, found->base, &span);
        dry_refund_host(span.counted);
    }
    dry_unlock();
    return dry_fail(ok ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaHostGetDevicePointer(void **device_pointer, void *pointer, unsigned flags) {
    (void)flags;
    *device_pointer = pointer; /* unified addressing */
    return cudaSuccess;
}

cudaError_t cudaHostGetFlags(unsigned *flags, void *pointer) {
    void *base;
    size_t size;
    dry_lock();
    int found = dry_host_find(pointer, &base, &size);
    dry_unlock();
    *flags = 0;
    return dry_fail(found ? cudaSuccess : cudaErrorInvalidValue);
}
