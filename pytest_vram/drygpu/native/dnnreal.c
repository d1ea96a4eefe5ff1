/* The installed cuDNN, asked without a device.
 *
 * Since 9.8 cuDNN builds heuristics and execution plans from a description of a device ("deviceless ahead-of-time
 * compilation"): neither a driver nor the CUDA runtime is asked. Its libraries are loaded part by part, each with its
 * own symbols first, because the functions of the same names in this library would otherwise take their place.
 *
 * PYTEST_VRAM_CUDNN=off keeps it out, and then, as where it is missing or older than 9.11, the stand-ins answer.
 */
#include <cuda_runtime_api.h>

#include "dnn.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OLDEST = 91100, DEVICE_PROPERTIES = 38, PROPERTIES_JSON = 2702, TYPE_CHAR = 24 };

/* Each library comes after those that it needs. The last two came with later versions and may be missing. */
static const char *const names[] = {"graph",    "ops",       "cnn",
                                    "adv",      "heuristic", "engines_precompiled",
                                    "engines_runtime_compiled", "engines_tensor_ir", "ext"};
enum { PARTS = sizeof names / sizeof *names, NEEDED = 7 };

static void *parts[PARTS], *properties;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static int load_parts(void) {
    for (int i = 0; i < PARTS; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/libcudnn_%s.so.9", DRY_CUDNN_FOLDER, names[i]);
        parts[i] = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
        if (parts[i] == NULL && i < NEEDED) return 0;
    }
    return 1;
}

static void *function(const char *name) {
    for (int i = 0; i < PARTS; i++) {
        void *found = parts[i] ? dlsym(parts[i], name) : NULL;
        if (found != NULL) return found;
    }
    return NULL;
}

/* The card in cuDNN's words: the keys that it writes itself when it serializes such a descriptor. All are needed. */
static int describe(char *text, size_t room) {
    const dry_card *card = dry_the_card();
#define GET(name) dry_attribute(cudaDevAttr##name, 0)
    int written = snprintf(
        text, room,
        "{\"maxGridSize\":[%d,%d,%d],\"maxBlockSize\":[%d,%d,%d],\"regsPerBlock\":%d,\"multiProcessorCount\":%d,"
        "\"warpSize\":%d,\"maxSharedMemoryPerBlock\":%d,\"maxSharedMemoryPerBlockOptin\":%d,"
        "\"reservedSharedMemoryPerBlock\":%d,\"maxRegistersPerSM\":%d,\"maxCtasPerSM\":%d,\"maxThreadsPerBlock\":%d,"
        "\"maxThreadsPerSM\":%d,\"pciDeviceId\":0,\"isTccDriver\":0,\"supportCoopLaunch\":%d,\"smClockRateKHz\":%d,"
        "\"memClockRateKHz\":%d,\"l2CacheSize\":%d,\"deviceName\":\"%s\",\"deviceVer\":%d,\"driverVer\":%d,"
        "\"cudaDeviceId\":0,\"totalGlobalMem\":%zu}",
        GET(MaxGridDimX), GET(MaxGridDimY), GET(MaxGridDimZ), GET(MaxBlockDimX), GET(MaxBlockDimY), GET(MaxBlockDimZ),
        GET(MaxRegistersPerBlock), GET(MultiProcessorCount), GET(WarpSize), GET(MaxSharedMemoryPerBlock),
        GET(MaxSharedMemoryPerBlockOptin), GET(ReservedSharedMemoryPerBlock), GET(MaxRegistersPerMultiprocessor),
        GET(MaxBlocksPerMultiprocessor), GET(MaxThreadsPerBlock), GET(MaxThreadsPerMultiProcessor),
        GET(CooperativeLaunch), GET(ClockRate), GET(MemoryClockRate), GET(L2CacheSize), card->product,
        card->major * 100 + card->minor * 10, CUDART_VERSION, card->total_bytes);
#undef GET
    return written > 0 && (size_t)written < room;
}

static int describe_device(void) {
    char text[2048];
    void *made = NULL;
    int (*create)(int, void **) = function("cudnnBackendCreateDescriptor");
    int (*set)(void *, int, int, int64_t, const void *) = function("cudnnBackendSetAttribute");
    int (*finalize)(void *) = function("cudnnBackendFinalize");
    if (create == NULL || set == NULL || finalize == NULL || !describe(text, sizeof text)) return 0;
    if (create(DEVICE_PROPERTIES, &made) != DNN_OK) return 0;
    if (set(made, PROPERTIES_JSON, TYPE_CHAR, (int64_t)strlen(text) + 1, text) != DNN_OK || finalize(made) != DNN_OK)
        return 0;
    properties = made;
    return 1;
}

static void load(void) {
    const char *wish = getenv("PYTEST_VRAM_CUDNN");
    if (wish != NULL && strcmp(wish, "off") == 0) return;
    if (DRY_CUDNN_VERSION < OLDEST || DRY_CUDNN_FOLDER[0] == '\0' || dry_visible_count() == 0) return;
    if (!load_parts() || !describe_device()) properties = NULL;
}

const void *dry_dnn_device_properties(void) {
    pthread_once(&once, load);
    return properties;
}

int dry_dnn_is_real(void) { return dry_dnn_device_properties() != NULL; }
void *dry_dnn_function(const char *name) { return dry_dnn_is_real() ? function(name) : NULL; }
