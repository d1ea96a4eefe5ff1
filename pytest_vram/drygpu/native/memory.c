/* cudaMalloc and related functions: device memory, managed memory, and the attributes of pointers. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <string.h>

int dry_malloc(int device, size_t bytes, uintptr_t *address) {
    *address = 0;
    if (bytes == 0) return cudaSuccess;
    if (bytes > dry_the_card()->total_bytes) {
        dry_lock();
        dry_charge(device, bytes); /* counts the refusal */
        dry_unlock();
        return cudaErrorMemoryAllocation;
    }
    size_t rounded = DRY_ROUND_UP(bytes, DRY_PAGE);
    dry_lock();
    if (!dry_charge(device, rounded)) {
        dry_unlock();
        return cudaErrorMemoryAllocation;
    }
    dry_span span = {.kind = DRY_SPAN_MALLOC, .counted = rounded};
    *address = dry_space_take(device, rounded, DRY_PAGE, 0, span);
    if (*address == 0) dry_refund(device, rounded);
    dry_unlock();
    return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}

int dry_free(uintptr_t address) {
    if (address == 0) return cudaSuccess;
    dry_lock();
    int device, result = cudaSuccess;
    dry_span *found = dry_space_find(address, &device), span;
    if (found == NULL || found->base != address ||
        (device >= 0 && (found->kind == DRY_SPAN_VMM || found->kind == DRY_SPAN_SHARED))) {
        result = cudaErrorInvalidValue;
    } else if (device == DRY_IS_MANAGED) {
        dry_managed_release(address, &span);
        dry_refund_managed(span.device, span.counted);
    } else if (found->kind == DRY_SPAN_POOL) {
        result = dry_pool_free(*found);
    } else {
        dry_forget(address, found->size);
        dry_space_release(device, address, &span);
        dry_refund(device, span.counted);
    }
    dry_unlock();
    return result;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    if (pointer == NULL) return dry_fail(cudaErrorInvalidValue);
    uintptr_t address;
    int error = dry_malloc(device, bytes, &address);
    *pointer = (void *)address;
    return dry_fail(error);
}

cudaError_t cudaFree(void *pointer) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    dry_clock_wait_device(device);
    return dry_fail(dry_free((uintptr_t)pointer));
}
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return (void)stream, cudaFree(pointer); }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    dry_lock();
    *total_bytes = dry_the_card()->total_bytes;
    *free_bytes = *total_bytes - dry_used_bytes(device);
    dry_unlock();
    return cudaSuccess;
}

/* ---- managed memory: it can leave the card, so it is counted separately and fails only without address space ---- */
cudaError_t cudaMallocManaged(void **pointer, size_t bytes, unsigned flags) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    if (bytes == 0 || (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost))
        return dry_fail(cudaErrorInvalidValue);
    dry_lock();
    uintptr_t base = dry_managed_take(bytes, device);
    if (base) dry_charge_managed(device, bytes);
    dry_unlock();
    *pointer = (void *)base;
    return dry_fail(base ? cudaSuccess : cudaErrorMemoryAllocation);
}

#if CUDART_VERSION >= 13000
cudaError_t cudaMemPrefetchAsync(const void *pointer, size_t bytes, struct cudaMemLocation location, unsigned flags,
                                 cudaStream_t stream) {
    (void)bytes, (void)location, (void)flags, (void)stream;
#else
cudaError_t cudaMemPrefetchAsync(const void *pointer, size_t bytes, int device, cudaStream_t stream) {
    (void)bytes, (void)device, (void)stream;
#endif
    return dry_fail(dry_space_device_of((uintptr_t)pointer) == DRY_IS_MANAGED ? cudaSuccess : cudaErrorInvalidValue);
}

#if CUDART_VERSION >= 13000
cudaError_t cudaMemAdvise(const void *pointer, size_t bytes, enum cudaMemoryAdvise advice,
                          struct cudaMemLocation location) {
    (void)bytes, (void)advice, (void)location;
#else
cudaError_t cudaMemAdvise(const void *pointer, size_t bytes, enum cudaMemoryAdvise advice, int device) {
    (void)bytes, (void)advice, (void)device;
#endif
    return dry_fail(dry_space_device_of((uintptr_t)pointer) == DRY_IS_MANAGED ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    if (attributes == NULL) return dry_fail(cudaErrorInvalidValue);
    memset(attributes, 0, sizeof *attributes);
    void *base;
    size_t size;
    dry_lock();
    int device;
    dry_span *span = dry_space_find((uintptr_t)pointer, &device);
    if (span != NULL) {
        attributes->type = device == DRY_IS_MANAGED ? cudaMemoryTypeManaged : cudaMemoryTypeDevice;
        attributes->device = span->device;
        attributes->devicePointer = (void *)pointer;
        attributes->hostPointer = device == DRY_IS_MANAGED ? (void *)pointer : NULL;
    } else if (dry_host_find(pointer, &base, &size)) {
        attributes->type = cudaMemoryTypeHost;
        attributes->device = dry_current_device();
        attributes->devicePointer = attributes->hostPointer = (void *)pointer;
    } else {
        attributes->type = cudaMemoryTypeUnregistered;
        attributes->device = -2; /* cudaInvalidDeviceId */
        attributes->hostPointer = (void *)pointer;
    }
    dry_unlock();
    return cudaSuccess;
}
