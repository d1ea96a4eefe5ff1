/* Implements the runtime's functions for devices, peer access and versions. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static char peers[DRY_MAX_DEVICES][DRY_MAX_DEVICES];

cudaError_t cudaGetDeviceCount(int *count) {
    *count = dry_visible_count();
    return dry_fail(*count ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device) {
    if (dry_visible_count() == 0) return dry_fail(cudaErrorNoDevice);
    *device = dry_current_device();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return dry_fail(dry_set_current_device(device)); }
cudaError_t cudaInitDevice(int device, unsigned device_flags, unsigned flags) {
    (void)device_flags, (void)flags;
    if (dry_physical_index(device) < 0) return dry_fail(cudaErrorInvalidDevice);
    return dry_fail(dry_open_device(device));
}

cudaError_t cudaDeviceSynchronize(void) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    dry_clock_wait_device(device);
    dry_count_wait(device);
    return cudaSuccess;
}
cudaError_t cudaSetDeviceFlags(unsigned flags) { return (void)flags, cudaSuccess; }
cudaError_t cudaGetDeviceFlags(unsigned *flags) { return *flags = 0, cudaSuccess; }
cudaError_t cudaDeviceSetLimit(enum cudaLimit limit, size_t value) { return (void)limit, (void)value, cudaSuccess; }
cudaError_t cudaDeviceGetLimit(size_t *value, enum cudaLimit limit) {
    *value = limit == cudaLimitMallocHeapSize ? (size_t)8 << 20 : 1024;
    return cudaSuccess;
}
cudaError_t cudaDeviceSetCacheConfig(enum cudaFuncCache config) { return (void)config, cudaSuccess; }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    if (dry_physical_index(device) < 0) return dry_fail(cudaErrorInvalidDevice);
    snprintf(text, (size_t)length, "0000:%02X:00.0", dry_attribute(cudaDevAttrPciBusId, device));
    return cudaSuccess;
}

cudaError_t cudaDeviceGetByPCIBusId(int *device, const char *text) {
    for (*device = 0; *device < dry_visible_count(); ++*device) {
        char mine[32];
        cudaDeviceGetPCIBusId(mine, sizeof mine, *device);
        if (strcasecmp(mine, text) == 0) return cudaSuccess;
    }
    return dry_fail(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    if (dry_physical_index(device) < 0 || dry_physical_index(peer) < 0) return dry_fail(cudaErrorInvalidDevice);
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    (void)flags;
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    if (dry_physical_index(peer) < 0 || peer == device) return dry_fail(cudaErrorInvalidDevice);
    if (peers[device][peer]) return dry_fail(cudaErrorPeerAccessAlreadyEnabled);
    peers[device][peer] = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
    int device = dry_ready();
    if (device < 0 || dry_physical_index(peer) < 0) return dry_fail(cudaErrorInvalidDevice);
    if (!peers[device][peer]) return dry_fail(cudaErrorPeerAccessNotEnabled);
    peers[device][peer] = 0;
    return cudaSuccess;
}

/* Finds a function of the driver by name, the newest version first. The functions are in this same library. dlsym also
   searches the libraries that this one needs, so a function that it finds in a real driver is refused. */
int dry_entry_point(const char *symbol, void **function) {
    char name[256];
    static const char *const suffixes[] = {"_v3", "_v2", ""};
    Dl_info self, found;
    *function = NULL;
    if (!dladdr((void *)dry_entry_point, &self)) return 0;
    void *library = dlopen(self.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    for (size_t i = 0; library && i < sizeof suffixes / sizeof *suffixes && *function == NULL; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        void *candidate = dlsym(library, name);
        if (candidate && dladdr(candidate, &found) && found.dli_fbase == self.dli_fbase) *function = candidate;
    }
    if (library) dlclose(library);
    return *function != NULL;
}

cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *status) {
    (void)flags;
    int found = dry_entry_point(symbol, function);
    if (status) *status = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return dry_fail(found || status ? cudaSuccess : cudaErrorSymbolNotFound);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    (void)version;
    return cudaGetDriverEntryPoint(symbol, function, flags, status);
}
