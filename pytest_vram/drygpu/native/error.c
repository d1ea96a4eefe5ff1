/* Errors: their names and texts, the last error of each thread, and the status of functions that are missing. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    int code;
    const char *name, *text;
} known[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {3, "cudaErrorInitializationError", "initialization error"},
    {4, "cudaErrorCudartUnloading", "driver shutting down"},
    {9, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {17, "cudaErrorInvalidDevicePointer", "invalid device pointer"},
    {21, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {46, "cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"},
    {98, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {200, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {201, "cudaErrorDeviceUninitialized", "invalid device context"},
    {209, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {217, "cudaErrorPeerAccessUnsupported", "peer access is not supported between these two devices"},
    {304, "cudaErrorOperatingSystem", "OS call failed or operation not supported on this OS"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {500, "cudaErrorSymbolNotFound", "named symbol not found"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {701, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {704, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
    {705, "cudaErrorPeerAccessNotEnabled", "peer access has not been enabled"},
    {712, "cudaErrorHostMemoryAlreadyRegistered", "part or all of the requested memory range is already mapped"},
    {713, "cudaErrorHostMemoryNotRegistered", "pointer does not correspond to a registered memory region"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {800, "cudaErrorNotPermitted", "operation not permitted"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {904, "cudaErrorStreamCaptureUnmatched",
     "capture sequence contains a fork that was not joined to the primary stream"},
    {906, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {999, "cudaErrorUnknown", "unknown error"},
};

static __thread int last_error;

int dry_fail(int error) {
    if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
    return error;
}

const char *dry_error_name(int error) {
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].code == error) return known[i].name;
    return "unrecognized error code";
}

const char *dry_error_text(int error) {
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].code == error) return known[i].text;
    return "unrecognized error code";
}

const char *cudaGetErrorName(cudaError_t error) { return dry_error_name(error); }
const char *cudaGetErrorString(cudaError_t error) { return dry_error_text(error); }
cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
    int error = last_error;
    last_error = cudaSuccess;
    return error;
}

/* ---- functions that are not implemented ---- */
#define REPORTED 256
static const char *reported[REPORTED];
static int reported_count;

int dry_not_implemented(const char *name, int status) {
    dry_lock();
    int seen = 0;
    for (int i = 0; i < reported_count && !seen; i++) seen = strcmp(reported[i], name) == 0;
    if (!seen) {
        if (reported_count < REPORTED) reported[reported_count++] = name;
        fprintf(stderr, "pytest-vram dry GPU: NOT IMPLEMENTED: %s; the caller gets status %d (not supported)\n", name,
                status);
    }
    dry_unlock();
    return status;
}

const char *dry_not_implemented_text(const char *name) {
    dry_not_implemented(name, cudaErrorNotSupported);
    return "operation not supported by the dry GPU";
}

/* Returns the name of missing function number `index` that was called, or NULL; drygpu/driver.py reads it. */
const char *pytest_vram_dry_missing(int index) { return index >= 0 && index < reported_count ? reported[index] : NULL; }

/* ---- assumptions behind the figures, which drygpu/driver.py reads ---- */
#define NOTES 1024
static struct {
    const char *text;
    uint64_t count, bytes; /* the largest size that one of them was about */
} notes[NOTES];
static int note_count;

/* Sizes that differ by less than a sixteenth share an entry, so that a program of many shapes needs few. */
static unsigned class_of(uint64_t bytes) {
    if (bytes < 16) return (unsigned)bytes;
    unsigned exponent = 63 - (unsigned)__builtin_clzll(bytes);
    return exponent * 16 + (unsigned)(bytes >> (exponent - 4) & 15);
}

/* Counts an assumption each time that it is made, so that each test's own assumptions are known. Returns 1 if the text
 * is new: it is then stored, and the caller must not free it. */
int dry_note_of(const char *text, uint64_t bytes) {
    dry_lock();
    int i = 0, is_new;
    while (i < note_count && (class_of(notes[i].bytes) != class_of(bytes) || strcmp(notes[i].text, text) != 0)) i++;
    is_new = i == note_count && i < NOTES;
    if (i < NOTES) {
        if (is_new) notes[note_count++].text = text;
        notes[i].count++;
        if (bytes > notes[i].bytes) notes[i].bytes = bytes;
    }
    dry_unlock();
    return is_new;
}

int dry_note(const char *text) { return dry_note_of(text, 0); }

/* An assumption of Python code, which frees its own text after the call. */
void pytest_vram_dry_add_note(const char *text) {
    char *kept = strdup(text);
    if (kept != NULL && !dry_note(kept)) free(kept);
}

/* Returns note number `index`, with its count and its size; NULL after the last one. */
const char *pytest_vram_dry_note(int index, uint64_t *count, uint64_t *bytes) {
    dry_lock();
    const char *text = index >= 0 && index < note_count ? notes[index].text : NULL;
    if (text) *count = notes[index].count, *bytes = notes[index].bytes;
    dry_unlock();
    return text;
}
