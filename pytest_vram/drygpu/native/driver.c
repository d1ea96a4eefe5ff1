/* Implements the driver API: devices, contexts, memory and streams. CUresult and cudaError_t have the same values for
 * the errors used here, and the handles are the same, so most functions call the runtime's. */
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdio.h>
#include <string.h>

#define R(call) ((CUresult)(call))

struct CUctx_st {
    int device;
};
static struct CUctx_st contexts[DRY_MAX_DEVICES];
static __thread CUcontext stack[32];
static __thread int depth, detached;

static CUcontext context_of(int device) {
    contexts[device].device = device;
    return &contexts[device];
}

CUresult cuInit(unsigned flags) { return (void)flags, dry_visible_count() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int *version) { return R(cudaDriverGetVersion(version)); }
CUresult cuGetErrorName(CUresult error, const char **text) { return *text = dry_error_name((int)error), CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    return *text = dry_error_text((int)error), CUDA_SUCCESS;
}

/* cuGetProcAddress hands out the functions of this library. */
#undef cuGetProcAddress
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags) {
    (void)version, (void)flags;
    return dry_entry_point(symbol, function) ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    CUresult result = cuGetProcAddress(symbol, function, version, flags);
    if (status) *status = result == CUDA_SUCCESS ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return result;
}

/* NVIDIA's own libraries ask for these tables to call its driver's internal functions. A dry GPU has none. */
CUresult cuGetExportTable(const void **table, const CUuuid *id) {
    (void)id;
    return *table = NULL, CUDA_ERROR_NOT_FOUND;
}

/* ---- devices ---- */
CUresult cuDeviceGetCount(int *count) { return *count = dry_visible_count(), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return dry_physical_index(ordinal) < 0 ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    (void)device;
    snprintf(name, (size_t)length, "%s", dry_the_card()->product);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    if (dry_physical_index(device) < 0) return CUDA_ERROR_INVALID_DEVICE;
    dry_uuid(dry_physical_index(device), (uint8_t *)uuid);
    return CUDA_SUCCESS;
}
#undef cuDeviceGetUuid
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    return (void)device, *bytes = dry_the_card()->total_bytes, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return R(cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device));
}
CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    return (void)device, *major = dry_the_card()->major, *minor = dry_the_card()->minor, CUDA_SUCCESS;
}
CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device) {
    return R(cudaDeviceGetPCIBusId(text, length, device));
}
CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    return R(cudaDeviceCanAccessPeer(can, device, peer));
}

/* ---- contexts: the primary one of each device, and no other ---- */
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    if (dry_physical_index(device) < 0) return CUDA_ERROR_INVALID_DEVICE;
    dry_lock();
    int ok = dry_context_create(device);
    dry_unlock();
    *context = context_of(device);
    return ok ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return (void)device, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
    return (void)device, (void)flags, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (dry_physical_index(device) < 0) return CUDA_ERROR_INVALID_DEVICE;
    if (flags) *flags = 0;
    *active = dry_context_exists(device);
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    detached = context == NULL;
    return context == NULL ? CUDA_SUCCESS : R(dry_set_current_device(context->device));
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    int device = dry_current_device();
    *context = detached || dry_visible_count() == 0 || !dry_context_exists(device) ? NULL : context_of(device);
    return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (depth == 32 || context == NULL) return CUDA_ERROR_INVALID_CONTEXT;
    cuCtxGetCurrent(&stack[depth++]);
    return cuCtxSetCurrent(context);
}
CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) cuCtxGetCurrent(context);
    return cuCtxSetCurrent(stack[--depth]);
}
CUresult cuCtxGetDevice(CUdevice *device) {
    CUcontext context;
    cuCtxGetCurrent(&context);
    if (context == NULL) return CUDA_ERROR_INVALID_CONTEXT;
    return *device = context->device, CUDA_SUCCESS;
}
CUresult cuCtxGetFlags(unsigned *flags) { return *flags = 0, CUDA_SUCCESS; }
CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version) {
    return (void)context, *version = CUDA_VERSION, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return R(cudaDeviceGetLimit(value, (enum cudaLimit)limit)); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return R(cudaDeviceSetLimit((enum cudaLimit)limit, value)); }
CUresult cuCtxSynchronize(void) { return R(cudaDeviceSynchronize()); }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    return R(cudaDeviceGetStreamPriorityRange(least, greatest));
}

/* ---- memory ---- */
CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) { return R(cudaMemGetInfo(free_bytes, total_bytes)); }
CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes) { return R(cudaMalloc((void **)pointer, bytes)); }
CUresult cuMemFree_v2(CUdeviceptr pointer) { return R(cudaFree((void *)pointer)); }
CUresult cuMemAllocManaged(CUdeviceptr *pointer, size_t bytes, unsigned flags) {
    return R(cudaMallocManaged((void **)pointer, bytes, flags));
}
CUresult cuMemAllocHost_v2(void **pointer, size_t bytes) { return R(cudaMallocHost(pointer, bytes)); }
CUresult cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    return R(cudaHostAlloc(pointer, bytes, flags));
}
CUresult cuMemFreeHost(void *pointer) { return R(cudaFreeHost(pointer)); }
CUresult cuMemHostRegister_v2(void *pointer, size_t bytes, unsigned flags) {
    return R(cudaHostRegister(pointer, bytes, flags));
}
CUresult cuMemHostUnregister(void *pointer) { return R(cudaHostUnregister(pointer)); }
CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t n) {
    return R(cudaMemcpy((void *)to, (void *)from, n, cudaMemcpyDefault));
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
    return R(cudaMemcpyAsync((void *)to, (void *)from, n, cudaMemcpyDefault, s));
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t n) {
    return R(cudaMemcpy((void *)to, from, n, cudaMemcpyHostToDevice));
}
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t n) {
    return R(cudaMemcpy(to, (void *)from, n, cudaMemcpyDeviceToHost));
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t n) { return cuMemcpy(to, from, n); }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t n, CUstream s) {
    return R(cudaMemcpyAsync((void *)to, from, n, cudaMemcpyHostToDevice, s));
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t n, CUstream s) {
    return R(cudaMemcpyAsync(to, (void *)from, n, cudaMemcpyDeviceToHost, s));
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
    return cuMemcpyAsync(to, from, n, s);
}

static CUresult fill(CUdeviceptr to, const void *pattern, size_t width, size_t count, CUstream stream) {
    if (dry_ready() < 0) return CUDA_ERROR_NO_DEVICE;
    dry_count_fill(width * count, stream);
    if (dry_is_capturing(stream)) return CUDA_SUCCESS;
    return dry_fill((void *)to, pattern, width, count) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char v, size_t n) { return fill(to, &v, 1, n, NULL); }
CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short v, size_t n) { return fill(to, &v, 2, n, NULL); }
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned v, size_t n) { return fill(to, &v, 4, n, NULL); }
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char v, size_t n, CUstream s) { return fill(to, &v, 1, n, s); }
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short v, size_t n, CUstream s) { return fill(to, &v, 2, n, s); }
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned v, size_t n, CUstream s) { return fill(to, &v, 4, n, s); }

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
    dry_lock();
    dry_span *span = dry_space_find((uintptr_t)pointer, NULL);
    if (span && base) *base = (CUdeviceptr)span->base;
    if (span && size) *size = span->size;
    dry_unlock();
    return span ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    struct cudaPointerAttributes a;
    cudaPointerGetAttributes(&a, (void *)pointer);
    if (a.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: return *(CUcontext *)value = context_of(a.device), CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        return *(unsigned *)value = a.type == cudaMemoryTypeHost ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE,
                          CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        return *(void **)value = a.hostPointer, a.hostPointer ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: return *(unsigned *)value = a.type == cudaMemoryTypeManaged, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: return *(int *)value = a.device, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: return *(unsigned *)value = 1, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: return *(unsigned long long *)value = pointer, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: return cuMemGetAddressRange_v2(value, NULL, pointer);
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: return cuMemGetAddressRange_v2(NULL, value, pointer);
    default: return R(dry_not_implemented("cuPointerGetAttribute for this attribute", CUDA_ERROR_NOT_SUPPORTED));
    }
}

/* ---- streams and events ---- */
CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return R(cudaStreamCreateWithFlags(stream, flags)); }
CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    return R(cudaStreamCreateWithPriority(stream, flags, priority));
}
CUresult cuStreamDestroy_v2(CUstream stream) { return R(cudaStreamDestroy(stream)); }
CUresult cuStreamSynchronize(CUstream stream) { return R(cudaStreamSynchronize(stream)); }
CUresult cuStreamQuery(CUstream stream) { return R(cudaStreamQuery(stream)); }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    return R(cudaStreamWaitEvent(stream, event, flags));
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    enum cudaStreamCaptureStatus answer;
    cudaStreamIsCapturing(stream, &answer);
    return *status = (CUstreamCaptureStatus)answer, CUDA_SUCCESS;
}
CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { return (void)stream, cuCtxGetCurrent(context); }
CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
    return R(cudaLaunchHostFunc(stream, function, data));
}
CUresult cuEventCreate(CUevent *event, unsigned flags) { return R(cudaEventCreateWithFlags(event, flags)); }
CUresult cuEventDestroy_v2(CUevent event) { return R(cudaEventDestroy(event)); }
CUresult cuEventRecord(CUevent event, CUstream stream) { return R(cudaEventRecord(event, stream)); }
CUresult cuEventSynchronize(CUevent event) { return R(cudaEventSynchronize(event)); }
CUresult cuEventQuery(CUevent event) { return R(cudaEventQuery(event)); }
CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    return R(cudaEventElapsedTime(milliseconds, start, end));
}

#if CUDA_VERSION >= 12090
/* The driver's log is always empty. */
CUresult cuLogsRegisterCallback(CUlogsCallback function, void *data, CUlogsCallbackHandle *handle) {
    (void)function, (void)data;
    *handle = (CUlogsCallbackHandle)&contexts[0];
    return CUDA_SUCCESS;
}
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle handle) { return (void)handle, CUDA_SUCCESS; }
#endif
