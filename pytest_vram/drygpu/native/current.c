/* Keeps the current device of each thread, and creates the context of a device when it is first used. */
#include <cuda_runtime_api.h>

#include "dry.h"

static __thread int current;

int dry_current_device(void) { return current; }

int dry_open_device(int device) {
    dry_lock();
    int ok = dry_context_create(device);
    dry_unlock();
    return ok ? cudaSuccess : cudaErrorMemoryAllocation;
}

int dry_set_current_device(int device) {
    if (dry_visible_count() == 0) return cudaErrorNoDevice;
    if (dry_physical_index(device) < 0) return cudaErrorInvalidDevice;
    current = device;
    return dry_open_device(device);
}

int dry_ready(void) {
    if (dry_visible_count() == 0) return -1;
    if (!dry_context_exists(current) && dry_open_device(current) != cudaSuccess) return -1;
    return current;
}
