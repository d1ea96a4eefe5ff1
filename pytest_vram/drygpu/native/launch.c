/* Registers, describes and launches kernels, which never run. */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "fatbin.h"

#include <stdlib.h>
#include <string.h>

/* ---- which image a host function belongs to ---- */
typedef struct {
    const void *host;
    dry_fatbin *image;
} entry;

static entry *table;
static size_t capacity, filled;

static entry *slot(entry *in, size_t size, const void *host) {
    size_t i = ((uintptr_t)host * 0x9E3779B97F4A7C15ull >> 20) & (size - 1);
    while (in[i].host != NULL && in[i].host != host) i = (i + 1) & (size - 1);
    return &in[i];
}

static void put(const void *host, dry_fatbin *image) {
    if (2 * (filled + 1) > capacity) {
        size_t larger = capacity ? 2 * capacity : 8192;
        entry *made = calloc(larger, sizeof *made);
        if (made == NULL) return;
        for (size_t i = 0; i < capacity; i++)
            if (table[i].host) *slot(made, larger, table[i].host) = table[i];
        free(table);
        table = made;
        capacity = larger;
    }
    entry *e = slot(table, capacity, host);
    if (e->host == NULL) filled++;
    *e = (entry){host, image};
}

static dry_fatbin *image_of(const void *host) { return capacity ? slot(table, capacity, host)->image : NULL; }

void **__cudaRegisterFatBinary(void *wrapper) {
    dry_fatbin *made = calloc(1, sizeof *made);
    if (made != NULL) made->wrapper = wrapper;
    return (void **)made;
}

void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) {
    (void)handle;
} /* called at exit, when other code may still use the image: its few bytes are not freed */
char __cudaInitModule(void **handle) { return (void)handle, 1; }

void __cudaRegisterFunction(void **handle, const char *host, char *device_function, const char *device_name,
                            int thread_limit, uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid, int *warp_size) {
    (void)device_function, (void)device_name, (void)thread_limit, (void)tid, (void)bid, (void)block, (void)grid,
        (void)warp_size;
    dry_lock();
    put(host, (dry_fatbin *)handle);
    dry_unlock();
}

void __cudaRegisterVar(void **handle, char *host, char *device_address, const char *device_name, int external,
                       size_t size, int constant, int global) {
    (void)handle, (void)host, (void)device_address, (void)device_name, (void)external, (void)size, (void)constant,
        (void)global;
}

void __cudaRegisterManagedVar(void **handle, void **host, char *device_address, const char *device_name, int external,
                              size_t size, int constant, int global) {
    (void)handle, (void)host, (void)device_address, (void)device_name, (void)external, (void)size, (void)constant,
        (void)global;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    return *kernel = (cudaKernel_t)host, cudaSuccess;
}
cudaError_t cudaGetFuncBySymbol(cudaFunction_t *function, const void *host) {
    return *function = (cudaFunction_t)host, cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { return *pointer = (void *)symbol, cudaSuccess; }

/* ---- the <<< >>> of the caller ---- */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} pushed[16];
static __thread int depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    if (depth == 16) return 1;
    pushed[depth].grid = grid, pushed[depth].block = block, pushed[depth].shared = shared,
    pushed[depth].stream = stream;
    depth++;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (depth == 0) return cudaErrorMissingConfiguration;
    depth--;
    *grid = pushed[depth].grid, *block = pushed[depth].block, *shared = pushed[depth].shared;
    *(cudaStream_t *)stream = pushed[depth].stream;
    return cudaSuccess;
}

/* ---- launches ---- */
static uint64_t launches; /* the time between two events is made up from them */
uint64_t dry_launch_count(void) { return __atomic_load_n(&launches, __ATOMIC_RELAXED); }

int dry_launch(const void *function, unsigned block_threads, uint64_t blocks, size_t shared, dry_stream stream) {
    int device = dry_ready();
    if (device < 0) return cudaErrorNoDevice;
    if (block_threads == 0 || block_threads > 1024 ||
        shared > (size_t)dry_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return cudaErrorInvalidConfiguration;
    dry_fatbin *image = image_of(function);
    if (image != NULL && dry_fatbin_binary(image) == 0) return cudaErrorNoKernelImageForDevice;
    int error = dry_load_module(device, image != NULL ? &image->loaded : NULL);
    if (error != cudaSuccess) return error;
    __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
    dry_count_kernel(stream);
    dry_clock_spend(stream, dry_time_of_threads(blocks * block_threads));
    dry_is_capturing(stream);
    return cudaSuccess;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        return dry_fail(cudaErrorInvalidConfiguration);
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    return dry_fail(dry_launch(function, block.x * block.y * block.z, blocks, shared, stream));
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    (void)arguments;
    return launch(function, grid, block, shared, stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    (void)arguments;
    return launch((const void *)kernel, grid, block, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    (void)arguments;
    return launch(function, grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    (void)arguments;
    return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

/* ---- what a kernel is ---- */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    memset(attributes, 0, sizeof *attributes);
    dry_fatbin *image = image_of(function);
    int binary = image ? dry_fatbin_binary(image) : dry_the_card()->major * 10 + dry_the_card()->minor;
    if (binary == 0) return dry_fail(cudaErrorNoKernelImageForDevice);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32; /* the true value is inside the compressed image; only occupancy depends on it */
    attributes->binaryVersion = binary;
    attributes->ptxVersion = image ? image->ptx : binary;
    attributes->maxDynamicSharedSizeBytes = 49152;
    attributes->preferredShmemCarveout = -1;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    (void)function;
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
        value > dry_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return dry_fail(cudaErrorInvalidValue);
    return cudaSuccess;
}

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                            int device) {
    (void)device;
    return cudaFuncSetAttribute((const void *)kernel, attribute, value);
}

cudaError_t cudaFuncSetCacheConfig(const void *function, enum cudaFuncCache config) {
    return (void)function, (void)config, cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    (void)function, (void)flags;
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    if (threads <= 0 || threads > 1024) return dry_fail(cudaErrorInvalidValue);
    /* Threads and shared memory limit it. Every supported card has 32 registers for each thread at full occupancy. */
    int warps = (threads + 31) / 32, most = dry_attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device) / 32 / warps;
    int limit = dry_attribute(cudaDevAttrMaxBlocksPerMultiprocessor, device);
    if (most > limit) most = limit;
    size_t each = shared + (size_t)dry_attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    size_t room = (size_t)dry_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (each > 0 && (size_t)most > room / each) most = (int)(room / each);
    *blocks = most;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                          size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
