/* Modules and kernels of the driver API, which Triton and torch.compile load and launch. Modules are not checked, and
 * nothing in them runs. */
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdlib.h>

#define R(call) ((CUresult)(call))

struct CUmod_st {
    int unused;
};
struct CUfunc_st {
    CUmodule module;
};

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (dry_ready() < 0) return CUDA_ERROR_NO_DEVICE;
    if (image == NULL) return CUDA_ERROR_INVALID_VALUE;
    *module = calloc(1, sizeof **module);
    return *module ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return (void)count, (void)options, (void)values, cuModuleLoadData(module, image);
}
CUresult cuModuleLoadFatBinary(CUmodule *module, const void *image) { return cuModuleLoadData(module, image); }
CUresult cuModuleLoad(CUmodule *module, const char *file) { return cuModuleLoadData(module, file); }
CUresult cuModuleUnload(CUmodule module) { return free(module), CUDA_SUCCESS; }

/* A program asks for each function once. Its few bytes stay allocated until the process ends. */
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (module == NULL || name == NULL) return CUDA_ERROR_INVALID_VALUE;
    *function = calloc(1, sizeof **function);
    if (*function == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    (*function)->module = module;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetModule(CUmodule *module, CUfunction function) { return *module = function->module, CUDA_SUCCESS; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    int capability = dry_the_card()->major * 10 + dry_the_card()->minor;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return *value = 1024, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: return *value = 32, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: return *value = capability, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: return *value = 49152, CUDA_SUCCESS;
    default: return *value = 0, CUDA_SUCCESS;
    }
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return R(cudaFuncSetAttribute(function, (enum cudaFuncAttribute)attribute, value));
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return (void)function, (void)config, CUDA_SUCCESS;
}

static CUresult launch(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned shared,
                       CUstream stream) {
    if (function == NULL) return CUDA_ERROR_INVALID_HANDLE;
    if (gx == 0 || gy == 0 || gz == 0) return CUDA_ERROR_INVALID_VALUE;
    return R(dry_launch(function, threads, (uint64_t)gx * gy * gz, shared, stream));
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
    return (void)arguments, (void)extra, launch(function, gx, gy, gz, bx * by * bz, shared, stream);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void **arguments) {
    return (void)arguments, launch(function, gx, gy, gz, bx * by * bz, shared, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
    (void)arguments, (void)extra;
    return launch(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX * c->blockDimY * c->blockDimZ,
                  c->sharedMemBytes, c->hStream);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    return R(cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared));
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    (void)function, (void)config;
    return *clusters = dry_the_card()->multiprocessors, CUDA_SUCCESS;
}

#if CUDA_VERSION >= 12000
/* Libraries and their kernels are the same as modules and their functions. */
CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jit, void **jit_values,
                           unsigned jit_count, CUlibraryOption *options, void **values, unsigned count) {
    (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    return cuModuleLoadData((CUmodule *)library, code);
}
CUresult cuLibraryUnload(CUlibrary library) { return cuModuleUnload((CUmodule)library); }
CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
    return cuModuleGetFunction((CUfunction *)kernel, (CUmodule)library, name);
}
CUresult cuLibraryGetModule(CUmodule *module, CUlibrary library) { return *module = (CUmodule)library, CUDA_SUCCESS; }
CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    return *function = (CUfunction)kernel, CUDA_SUCCESS;
}
CUresult cuKernelGetAttribute(int *value, CUfunction_attribute attribute, CUkernel kernel, CUdevice device) {
    return (void)device, cuFuncGetAttribute(value, attribute, (CUfunction)kernel);
}
CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
    return (void)device, cuFuncSetAttribute((CUfunction)kernel, attribute, value);
}

#endif
