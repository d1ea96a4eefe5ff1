/* The variants of cudaMemcpy and cudaMemset. All are complete when they return. */
#include <cuda_runtime_api.h>

#include "dry.h"

/* Returns the direction that the caller names, or else that of the addresses; managed memory counts as the device's. */
static int direction_of(const void *destination, const void *source, enum cudaMemcpyKind kind) {
    int to = dry_space_device_of((uintptr_t)destination) != DRY_NOT_DEVICE;
    int from = dry_space_device_of((uintptr_t)source) != DRY_NOT_DEVICE;
    switch (kind) {
    case cudaMemcpyHostToDevice: return DRY_TO_DEVICE;
    case cudaMemcpyDeviceToHost: return DRY_TO_HOST;
    case cudaMemcpyDeviceToDevice: return DRY_ON_DEVICE;
    case cudaMemcpyHostToHost: return DRY_HOST_TO_HOST;
    default: return to && from ? DRY_ON_DEVICE : to ? DRY_TO_DEVICE : from ? DRY_TO_HOST : DRY_HOST_TO_HOST;
    }
}

static int is_pinned(const void *pointer) {
    void *base;
    size_t size;
    dry_lock();
    int found = dry_host_find(pointer, &base, &size) || dry_space_device_of((uintptr_t)pointer) != DRY_NOT_DEVICE;
    dry_unlock();
    return found;
}

/* Makes one copy of `height` rows. "API synchronization behavior" in the runtime's manual says which copies wait: an
 * asynchronous copy waits if it goes to pageable memory, any other copy unless it stays within the device. */
static cudaError_t copy_rows(void *destination, size_t destination_pitch, const void *source, size_t source_pitch,
                             size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream, int blocking) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    int direction = direction_of(destination, source, kind);
    dry_count_copy(direction, width * height, stream);
    if (dry_is_capturing(stream)) return cudaSuccess; /* recorded, not done */
    for (size_t row = 0; row < height; row++)
        if (!dry_copy((char *)destination + row * destination_pitch, (const char *)source + row * source_pitch, width))
            return dry_fail(cudaErrorInvalidValue);
    if (blocking ? direction != DRY_ON_DEVICE : direction == DRY_TO_HOST && !is_pinned(destination))
        dry_count_blocking_copy(stream);
    return dry_fail(cudaSuccess);
}

cudaError_t cudaMemcpy(void *destination, const void *source, size_t bytes, enum cudaMemcpyKind kind) {
    return copy_rows(destination, bytes, source, bytes, bytes, 1, kind, NULL, 1);
}

cudaError_t cudaMemcpyAsync(void *destination, const void *source, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy_rows(destination, bytes, source, bytes, bytes, 1, kind, stream, 0);
}

cudaError_t cudaMemcpyPeer(void *destination, int to, const void *source, int from, size_t bytes) {
    (void)to, (void)from;
    return cudaMemcpy(destination, source, bytes, cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpyPeerAsync(void *destination, int to, const void *source, int from, size_t bytes,
                                cudaStream_t stream) {
    (void)to, (void)from;
    return cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToDevice, stream);
}

static cudaError_t copy_2d(void *destination, size_t destination_pitch, const void *source, size_t source_pitch,
                           size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream, int blocking) {
    if (width > destination_pitch || width > source_pitch) return dry_fail(cudaErrorInvalidValue);
    return copy_rows(destination, destination_pitch, source, source_pitch, width, height, kind, stream, blocking);
}

cudaError_t cudaMemcpy2DAsync(void *destination, size_t destination_pitch, const void *source, size_t source_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy_2d(destination, destination_pitch, source, source_pitch, width, height, kind, stream, 0);
}

cudaError_t cudaMemcpy2D(void *destination, size_t destination_pitch, const void *source, size_t source_pitch,
                         size_t width, size_t height, enum cudaMemcpyKind kind) {
    return copy_2d(destination, destination_pitch, source, source_pitch, width, height, kind, NULL, 1);
}

/* A symbol's address is that of its shadow variable on the host, which is ordinary memory. */
static cudaError_t to_symbol(size_t bytes, cudaStream_t stream, int blocking) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    dry_count_copy(DRY_TO_DEVICE, bytes, stream);
    if (blocking) dry_count_blocking_copy(stream);
    return cudaSuccess; /* only kernels read it, and they compute nothing */
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *source, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
    (void)symbol, (void)source, (void)offset, (void)kind;
    return to_symbol(bytes, NULL, 1);
}

cudaError_t cudaMemcpyToSymbolAsync(const void *symbol, const void *source, size_t bytes, size_t offset,
                                    enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)symbol, (void)source, (void)offset, (void)kind;
    return to_symbol(bytes, stream, 0);
}

static cudaError_t fill_rows(void *destination, size_t pitch, int value, size_t width, size_t height,
                             cudaStream_t stream) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    dry_count_fill(width * height, stream);
    if (dry_is_capturing(stream)) return cudaSuccess;
    unsigned char byte = (unsigned char)value;
    for (size_t row = 0; row < height; row++)
        if (!dry_fill((char *)destination + row * pitch, &byte, 1, width)) return dry_fail(cudaErrorInvalidValue);
    return dry_fail(cudaSuccess);
}

cudaError_t cudaMemsetAsync(void *destination, int value, size_t bytes, cudaStream_t stream) {
    return fill_rows(destination, bytes, value, bytes, 1, stream);
}

cudaError_t cudaMemset(void *destination, int value, size_t bytes) {
    return cudaMemsetAsync(destination, value, bytes, NULL);
}

cudaError_t cudaMemset2DAsync(void *destination, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
    return fill_rows(destination, pitch, value, width, height, stream);
}
