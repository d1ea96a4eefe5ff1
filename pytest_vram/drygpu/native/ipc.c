/* Device memory and events that another process of this machine uses too (CUDA IPC), as torch.multiprocessing shares
 * tensors: through queues, and from the workers of a DataLoader.
 *
 * A handle says how large the memory is. Whoever opens it gets addresses of its own, which hold nothing: the memory counts
 * only for the process that allocated it, and its values do not cross. An event that another process has recorded is
 * complete.
 */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "stream.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OF_MEMORY = 0x4d454d00, OF_EVENT = 0x45564e00 };

typedef struct {
    uint64_t kind, process, base, size;
} content;

typedef struct opened {
    struct opened *next;
    content what;
    int device, count;
    uintptr_t base;
} opened;

static opened *all;

_Static_assert(sizeof(content) <= sizeof(cudaIpcMemHandle_t) && sizeof(content) <= sizeof(cudaIpcEventHandle_t),
               "a handle has room for its content");

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (handle == NULL) return dry_fail(cudaErrorInvalidValue);
    int device;
    content made = {.kind = OF_MEMORY, .process = (uint64_t)getpid()};
    dry_lock();
    const dry_span *span = dry_space_find((uintptr_t)pointer, &device);
    int ok = span != NULL && device >= 0 && span->kind == DRY_SPAN_MALLOC;
    if (ok) made.base = span->base, made.size = span->size;
    dry_unlock();
    if (!ok) return dry_fail(cudaErrorInvalidValue); /* pools and reserved addresses are shared by other functions */
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &made, sizeof made);
    return cudaSuccess;
}

/* Whoever opens a handle again gets the same address. */
static opened *open_memory(content what, int device) {
    opened *found = all;
    while (found != NULL && (found->device != device || memcmp(&found->what, &what, sizeof what) != 0))
        found = found->next;
    if (found != NULL) return found->count++, found;
    if ((found = calloc(1, sizeof *found)) == NULL) return NULL;
    *found = (opened){.next = all, .what = what, .device = device, .count = 1};
    found->base = dry_space_take(device, what.size, DRY_PAGE, 0, (dry_span){.kind = DRY_SPAN_SHARED});
    if (found->base == 0) return free(found), NULL;
    return all = found;
}

cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned flags) {
    int device = dry_ready();
    content what;
    memcpy(&what, &handle, sizeof what);
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    if (pointer == NULL || flags != cudaIpcMemLazyEnablePeerAccess || what.kind != OF_MEMORY)
        return dry_fail(cudaErrorInvalidValue);
    if (what.process == (uint64_t)getpid()) return dry_fail(cudaErrorDeviceUninitialized); /* as the driver says it */
    dry_lock();
    const opened *found = open_memory(what, device);
    if (found != NULL) *pointer = (void *)found->base;
    dry_unlock();
    return dry_fail(found != NULL ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaIpcCloseMemHandle(void *pointer) {
    dry_lock();
    opened **at = &all, *found;
    while (*at != NULL && (*at)->base != (uintptr_t)pointer) at = &(*at)->next;
    found = *at;
    if (found != NULL && --found->count == 0) {
        dry_span removed;
        dry_forget(found->base, found->what.size);
        dry_space_release(found->device, found->base, &removed);
        *at = found->next;
        free(found);
    }
    dry_unlock();
    return dry_fail(found != NULL ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t event) {
    enum { WANTED = cudaEventInterprocess | cudaEventDisableTiming };
    if (event == NULL || handle == NULL || (event->flags & WANTED) != WANTED)
        return dry_fail(cudaErrorInvalidResourceHandle);
    content made = {.kind = OF_EVENT, .process = (uint64_t)getpid()};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &made, sizeof made);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t handle) {
    content what;
    memcpy(&what, &handle, sizeof what);
    if (event == NULL || what.kind != OF_EVENT) return dry_fail(cudaErrorInvalidValue);
    return cudaEventCreateWithFlags(event, cudaEventInterprocess | cudaEventDisableTiming);
}
