/* Returns the attributes of a card besides its memory. The limits by compute capability are those of the CUDA C++
 * Programming Guide, "Technical Specifications per Compute Capability". PyTorch uses them to size the scratch memory of
 * reductions and to choose attention kernels. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdio.h>
#include <string.h>

static const struct {
    int capability, threads, blocks, shared_kib, optin_kib, reserved_kib;
} limits[] = {
    {60, 2048, 32, 64, 48, 0},   {61, 2048, 32, 96, 48, 0},    {70, 2048, 32, 96, 96, 0},   {75, 1024, 16, 64, 64, 0},
    {80, 2048, 32, 164, 163, 1}, {86, 1536, 16, 100, 99, 1},   {87, 1536, 16, 164, 163, 1}, {89, 1536, 24, 100, 99, 1},
    {90, 2048, 32, 228, 227, 1}, {100, 2048, 32, 228, 227, 1}, {120, 1536, 24, 100, 99, 1},
};

/* Returns the row of the highest capability that is not above that of the card. */
static int row(void) {
    int capability = dry_the_card()->major * 10 + dry_the_card()->minor, best = 0;
    for (int i = 0; i < (int)(sizeof limits / sizeof *limits); i++)
        if (limits[i].capability <= capability) best = i;
    return best;
}

int dry_attribute(int attribute, int device) {
    const dry_card *card = dry_the_card();
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX:
    case cudaDevAttrMaxPitch: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return card->clock_khz;
    case cudaDevAttrMemoryClockRate: return card->memory_clock_khz;
    case cudaDevAttrTextureAlignment:
    case cudaDevAttrSurfaceAlignment: return 512;
    case cudaDevAttrTexturePitchAlignment: return 32;
    case cudaDevAttrMultiProcessorCount: return card->multiprocessors;
    case cudaDevAttrPciBusId: return dry_physical_index(device) + 1;
    case cudaDevAttrGlobalMemoryBusWidth: return card->bus_bits;
    case cudaDevAttrL2CacheSize: return card->l2_bytes;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return limits[row()].threads;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return limits[row()].blocks;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return limits[row()].shared_kib * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return limits[row()].optin_kib * 1024;
    case cudaDevAttrReservedSharedMemoryPerBlock: return limits[row()].reserved_kib * 1024;
    case cudaDevAttrAsyncEngineCount: return 2;
    case cudaDevAttrComputeCapabilityMajor: return card->major;
    case cudaDevAttrComputeCapabilityMinor: return card->minor;
    case cudaDevAttrClusterLaunch: return card->major >= 9;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio: return card->minor ? 64 : 2;
    case cudaDevAttrGpuOverlap:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrComputePreemptionSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported: return 1;
    case 102: return 1; /* CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, for which the runtime has no name */
    default: return 0;
    }
}

static void fill(struct cudaDeviceProp *p, int device) {
#define GET(name) dry_attribute(cudaDevAttr##name, device)
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", dry_the_card()->product);
    dry_uuid(dry_physical_index(device), (uint8_t *)&p->uuid);
    p->totalGlobalMem = dry_the_card()->total_bytes;
    p->sharedMemPerBlock = (size_t)GET(MaxSharedMemoryPerBlock);
    p->regsPerBlock = GET(MaxRegistersPerBlock);
    p->warpSize = GET(WarpSize);
    p->memPitch = (size_t)GET(MaxPitch);
    p->maxThreadsPerBlock = GET(MaxThreadsPerBlock);
    p->maxThreadsDim[0] = GET(MaxBlockDimX);
    p->maxThreadsDim[1] = GET(MaxBlockDimY);
    p->maxThreadsDim[2] = GET(MaxBlockDimZ);
    p->maxGridSize[0] = GET(MaxGridDimX);
    p->maxGridSize[1] = GET(MaxGridDimY);
    p->maxGridSize[2] = GET(MaxGridDimZ);
    p->totalConstMem = (size_t)GET(TotalConstantMemory);
    p->major = GET(ComputeCapabilityMajor);
    p->minor = GET(ComputeCapabilityMinor);
    p->textureAlignment = (size_t)GET(TextureAlignment);
    p->texturePitchAlignment = (size_t)GET(TexturePitchAlignment);
    p->surfaceAlignment = (size_t)GET(SurfaceAlignment);
    p->multiProcessorCount = GET(MultiProcessorCount);
    p->canMapHostMemory = GET(CanMapHostMemory);
    p->concurrentKernels = GET(ConcurrentKernels);
    p->pciBusID = GET(PciBusId);
    p->asyncEngineCount = GET(AsyncEngineCount);
    p->unifiedAddressing = GET(UnifiedAddressing);
    p->memoryBusWidth = GET(GlobalMemoryBusWidth);
    p->l2CacheSize = GET(L2CacheSize);
    p->maxThreadsPerMultiProcessor = GET(MaxThreadsPerMultiProcessor);
    p->streamPrioritiesSupported = GET(StreamPrioritiesSupported);
    p->globalL1CacheSupported = GET(GlobalL1CacheSupported);
    p->localL1CacheSupported = GET(LocalL1CacheSupported);
    p->sharedMemPerMultiprocessor = (size_t)GET(MaxSharedMemoryPerMultiprocessor);
    p->regsPerMultiprocessor = GET(MaxRegistersPerMultiprocessor);
    p->managedMemory = GET(ManagedMemory);
    p->concurrentManagedAccess = GET(ConcurrentManagedAccess);
    p->computePreemptionSupported = GET(ComputePreemptionSupported);
    p->canUseHostPointerForRegisteredMem = GET(CanUseHostPointerForRegisteredMem);
    p->cooperativeLaunch = GET(CooperativeLaunch);
    p->sharedMemPerBlockOptin = (size_t)GET(MaxSharedMemoryPerBlockOptin);
    p->maxBlocksPerMultiProcessor = GET(MaxBlocksPerMultiprocessor);
    p->reservedSharedMemPerBlock = (size_t)GET(ReservedSharedMemoryPerBlock);
    p->hostRegisterSupported = GET(HostRegisterSupported);
    p->memoryPoolsSupported = GET(MemoryPoolsSupported);
    p->clusterLaunch = GET(ClusterLaunch);
#if CUDART_VERSION < 13000
    p->clockRate = GET(ClockRate);
    p->memoryClockRate = GET(MemoryClockRate);
    p->deviceOverlap = GET(GpuOverlap);
    p->singleToDoublePrecisionPerfRatio = GET(SingleToDoublePrecisionPerfRatio);
#endif
#undef GET
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    if (dry_physical_index(device) < 0) return dry_fail(cudaErrorInvalidDevice);
    fill(properties, device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    if (dry_physical_index(device) < 0) return dry_fail(cudaErrorInvalidDevice);
    *value = dry_attribute(attribute, device);
    return cudaSuccess;
}
