/* Counts the memory that the driver holds beside the program's own.
 *
 * Since CUDA 11.7 kernels are loaded when they are first launched, so a context grows as a program goes on: by local
 * memory and heaps at the first kernel of all, by the kernels of cuBLAS and cuDNN at the first use of each, and by each
 * module of PyTorch's and bitsandbytes'. What Triton compiles is small, and not counted.
 *
 * The card table has the sizes for cards on which they were measured, and 0 for the others.
 */
#include <cuda_runtime_api.h>

#include "dry.h"

static uint64_t kernels_seen, products_seen, plans_seen; /* a bit for each device */

static int grow_once(int device, uint64_t *seen, size_t bytes) {
    uint64_t bit = (uint64_t)1 << device;
    if (__atomic_load_n(seen, __ATOMIC_RELAXED) & bit) return cudaSuccess;
    dry_lock();
    int fits = (*seen & bit) || bytes == 0 || dry_context_grow(device, bytes);
    if (fits) __atomic_or_fetch(seen, bit, __ATOMIC_RELAXED);
    dry_unlock();
    return fits ? cudaSuccess : cudaErrorMemoryAllocation;
}

int dry_load_module(int device, uint64_t *loaded) {
    int error = grow_once(device, &kernels_seen, dry_the_card()->first_kernel_bytes);
    return error != cudaSuccess || loaded == NULL ? error : grow_once(device, loaded, dry_the_card()->module_bytes);
}

int dry_load_plans(int device) { return grow_once(device, &plans_seen, dry_the_card()->plans_bytes); }
int dry_load_products(int device) { return grow_once(device, &products_seen, dry_the_card()->products_bytes); }
