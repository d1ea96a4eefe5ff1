/* cudaMemcpy and cudaMemset in their many spellings. All are complete when they return. */
#include <cuda_runtime_api.h>

#include "dry.h"

static cudaError_t copy(void *destination, const void *source, size_t bytes, cudaStream_t stream) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (dry_is_capturing(stream)) return cudaSuccess; /* recorded, not done */
    return dry_fail(dry_copy(destination, source, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaMemcpy(void *destination, const void *source, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    return copy(destination, source, bytes, NULL);
}

cudaError_t cudaMemcpyAsync(void *destination, const void *source, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    (void)kind;
    return copy(destination, source, bytes, stream);
}

cudaError_t cudaMemcpyPeer(void *destination, int to, const void *source, int from, size_t bytes) {
    (void)to, (void)from;
    return copy(destination, source, bytes, NULL);
}

cudaError_t cudaMemcpyPeerAsync(void *destination, int to, const void *source, int from, size_t bytes,
                                cudaStream_t stream) {
    (void)to, (void)from;
    return copy(destination, source, bytes, stream);
}

cudaError_t cudaMemcpy2DAsync(void *destination, size_t destination_pitch, const void *source, size_t source_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    if (width > destination_pitch || width > source_pitch) return dry_fail(cudaErrorInvalidValue);
    for (size_t row = 0; row < height; row++) {
        cudaError_t error = copy((char *)destination + row * destination_pitch,
                                 (const char *)source + row * source_pitch, width, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy2D(void *destination, size_t destination_pitch, const void *source, size_t source_pitch,
                         size_t width, size_t height, enum cudaMemcpyKind kind) {
    return cudaMemcpy2DAsync(destination, destination_pitch, source, source_pitch, width, height, kind, NULL);
}

/* A symbol's address is the host's shadow variable: real memory, written like any other. */
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *source, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
    (void)symbol, (void)source, (void)bytes, (void)offset, (void)kind;
    return dry_ready() < 0 ? dry_fail(cudaErrorNoDevice)
                           : cudaSuccess; /* only kernels read it, and they compute nothing */
}

cudaError_t cudaMemcpyToSymbolAsync(const void *symbol, const void *source, size_t bytes, size_t offset,
                                    enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream;
    return cudaMemcpyToSymbol(symbol, source, bytes, offset, kind);
}

cudaError_t cudaMemsetAsync(void *destination, int value, size_t bytes, cudaStream_t stream) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (dry_is_capturing(stream)) return cudaSuccess;
    unsigned char byte = (unsigned char)value;
    return dry_fail(dry_fill(destination, &byte, 1, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaMemset(void *destination, int value, size_t bytes) {
    return cudaMemsetAsync(destination, value, bytes, NULL);
}

cudaError_t cudaMemset2DAsync(void *destination, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) {
        cudaError_t error = cudaMemsetAsync((char *)destination + row * pitch, value, width, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
