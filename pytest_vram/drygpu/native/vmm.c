/* Implements virtual memory management, which expandable segments use: reserve addresses, create memory, and map the
 * memory to the addresses. Memory counts from cuMemCreate until it is both released and unmapped. */
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    int device;
    size_t size;
    unsigned references; /* handles held and mappings made */
    CUmemAllocationProp properties;
} memory;

static dry_spans mappings;

static void drop(memory *m) {
    if (--m->references) return;
    dry_refund(m->device, m->size);
    free(m);
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags option) {
    (void)properties, (void)option;
    *granularity = DRY_PAGE;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    (void)flags;
    int device = dry_ready();
    if (device < 0) return CUDA_ERROR_NO_DEVICE;
    if (size == 0 || size % DRY_PAGE || (alignment & (alignment - 1))) return CUDA_ERROR_INVALID_VALUE;
    dry_lock();
    dry_span span = {.kind = DRY_SPAN_VMM};
    *pointer = dry_space_take(device, size, alignment > DRY_PAGE ? alignment : DRY_PAGE, (uintptr_t)hint, span);
    dry_unlock();
    return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
    dry_lock();
    int device;
    dry_span *span = dry_space_find((uintptr_t)pointer, &device);
    int ok = span != NULL && device >= 0 && span->kind == DRY_SPAN_VMM && span->base == pointer && span->size == size &&
             !dry_spans_overlap(&mappings, (uintptr_t)pointer, size) &&
             dry_space_release(device, (uintptr_t)pointer, NULL);
    dry_unlock();
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties,
                     unsigned long long flags) {
    (void)flags;
    int device = properties->location.id;
    if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE || dry_physical_index(device) < 0 || size == 0 ||
        size % DRY_PAGE)
        return CUDA_ERROR_INVALID_VALUE;
    if (properties->requestedHandleTypes & 8)
        return CUDA_ERROR_NOT_PERMITTED; /* CU_MEM_HANDLE_TYPE_FABRIC, which CUDA before 12.3 does not name: no fabric
                                            here */
    memory *m = calloc(1, sizeof *m);
    if (m == NULL) return CUDA_ERROR_OUT_OF_MEMORY;
    *m = (memory){.device = device, .size = size, .references = 1, .properties = *properties};
    dry_lock();
    int ok = dry_context_create(device) && dry_charge(device, size);
    dry_unlock();
    if (!ok) {
        free(m);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle = (CUmemGenericAllocationHandle)(uintptr_t)m;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    if (handle == 0) return CUDA_ERROR_INVALID_VALUE;
    dry_lock();
    drop((memory *)(uintptr_t)handle);
    dry_unlock();
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    (void)flags;
    memory *m = (memory *)(uintptr_t)handle;
    dry_lock();
    dry_span *span = dry_space_find((uintptr_t)pointer, NULL);
    int ok = m != NULL && span != NULL && span->kind == DRY_SPAN_VMM && pointer + size <= span->base + span->size &&
             offset == 0 && size == m->size && !dry_spans_overlap(&mappings, (uintptr_t)pointer, size) &&
             dry_spans_insert(&mappings,
                              (dry_span){.base = (uintptr_t)pointer, .size = size, .device = m->device, .owner = m});
    if (ok) m->references++;
    dry_unlock();
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* One call may unmap several neighbouring mappings, but not a part of one. */
CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    uintptr_t at = (uintptr_t)pointer, end = at + size;
    dry_lock();
    int ok = size > 0;
    while (ok && at < end) {
        dry_span *found = dry_spans_find(&mappings, at), span;
        ok = found != NULL && found->base == at && at + found->size <= end;
        if (!ok) break;
        dry_spans_remove(&mappings, at, &span);
        dry_forget(span.base, span.size);
        drop(span.owner);
        at += span.size;
    }
    dry_unlock();
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc *access, size_t count) {
    (void)access, (void)count;
    dry_lock();
    int ok = size > 0 && dry_spans_overlap(&mappings, (uintptr_t)pointer, size);
    dry_unlock();
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr pointer) {
    (void)location, (void)pointer;
    *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *pointer) {
    dry_lock();
    dry_span *span = dry_spans_find(&mappings, (uintptr_t)pointer);
    if (span != NULL) {
        ((memory *)span->owner)->references++;
        *handle = (CUmemGenericAllocationHandle)(uintptr_t)span->owner;
    }
    dry_unlock();
    return span ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *properties, CUmemGenericAllocationHandle handle) {
    *properties = ((memory *)(uintptr_t)handle)->properties;
    return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void *shared, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
                                      unsigned long long flags) {
    (void)shared, (void)handle, (void)type, (void)flags;
    return (CUresult)dry_not_implemented("cuMemExportToShareableHandle (device memory shared between processes)",
                                         CUDA_ERROR_NOT_SUPPORTED);
}
