/* Manages the address space of device memory and managed memory.
 *
 * The memory of a device is a range of private anonymous memory that is reserved and not committed. Addresses are
 * fixed, so that two runs of a program see the same ones. They are given out from the top down: among free blocks of
 * one size PyTorch's allocator takes the one at the lowest address, and in this order it takes the ones that it took on
 * the H200 of tests/truth. Pages exist only where a small copy or fill has written. Huge pages are switched off, because
 * one written byte would take 2 MiB of the host's memory.
 */
#include "dry.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FIRST_ADDRESS 0x100000000000ull /* below executables and libraries, which start at 0x555500000000 */
#define ALL_DEVICES ((size_t)64 << 40)
#define ONE_DEVICE ((size_t)8 << 40)
#define MANAGED_BYTES ((size_t)1 << 40)

typedef struct {
    uintptr_t base;
    size_t size;
    dry_spans spans;
} space;

static space devices[DRY_MAX_DEVICES], managed;
static int opened; /* only devices[0..opened) can be open, so a search ends there */

static void *reserve(uintptr_t hint, size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (hint ? MAP_FIXED_NOREPLACE : 0);
    void *got = mmap((void *)hint, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (got == MAP_FAILED && errno == ENOMEM) {
        /* With vm.overcommit_memory=2, Linux counts private memory even if it is never used, but not a sparse file. */
        int file = memfd_create("pytest-vram-dry", MFD_CLOEXEC);
        if (file >= 0) {
            if (ftruncate(file, (off_t)size) == 0)
                got = mmap((void *)hint, size, PROT_READ | PROT_WRITE,
                           MAP_SHARED | MAP_NORESERVE | (flags & MAP_FIXED_NOREPLACE), file, 0);
            close(file);
        }
    }
    if (got == MAP_FAILED) return NULL;
    if (hint && (uintptr_t)got != hint) { /* before Linux 4.17, MAP_FIXED_NOREPLACE is only a hint */
        munmap(got, size);
        errno = EEXIST;
        return NULL;
    }
    madvise(got, size, MADV_NOHUGEPAGE);
    madvise(got, size, MADV_DONTDUMP);
    return got;
}

static int open_space(space *s, uintptr_t hint, size_t size, size_t least, const char *what) {
    if (s->base) return 1;
    void *got = reserve(hint, size);
    if (got == NULL) got = reserve(0, size);
    while (got == NULL && size / 2 >= least) got = reserve(0, size /= 2);
    if (got == NULL) {
        fprintf(
            stderr,
            "pytest-vram dry GPU: cannot reserve %zu GiB of address space for %s: %s. It costs no memory, but a limit "
            "forbids it: raise `ulimit -v` (RLIMIT_AS) of this process\n",
            least >> 30, what, strerror(errno));
        return 0;
    }
    s->base = DRY_ROUND_UP((uintptr_t)got, DRY_PAGE);
    s->size = size - (s->base - (uintptr_t)got);
    return 1;
}

int dry_space_open(int device) {
    size_t stride = ALL_DEVICES / (size_t)dry_physical_count() / DRY_PAGE * DRY_PAGE;
    if (stride > ONE_DEVICE) stride = ONE_DEVICE;
    /* Twice the card's memory, because one expandable segment reserves addresses for 9/8 of it. */
    size_t least = DRY_ROUND_UP(2 * dry_the_card()->total_bytes + ((size_t)1 << 30), DRY_PAGE);
    if (least > stride) stride = least;
    if (!open_space(&devices[device], FIRST_ADDRESS + (size_t)dry_physical_index(device) * stride, stride, least,
                    "the device"))
        return 0;
    if (opened <= device) opened = device + 1;
    return 1;
}

uintptr_t dry_space_take(int device, size_t size, size_t align, uintptr_t hint, dry_span span) {
    space *s = &devices[device];
    uintptr_t high = s->base + s->size, base = 0;
    if (hint >= s->base && hint < high && hint % align == 0)
        base = dry_spans_first_fit(&s->spans, hint, hint + size < high ? hint + size : high, size, align);
    if (base == 0) base = dry_spans_last_fit(&s->spans, s->base, high, size, align);
    if (base == 0) return 0;
    span.base = base;
    span.size = size;
    span.device = device;
    return dry_spans_insert(&s->spans, span) ? base : 0;
}

int dry_space_release(int device, uintptr_t base, dry_span *removed) {
    return dry_spans_remove(&devices[device].spans, base, removed);
}

int dry_space_device_of(uintptr_t address) {
    for (int device = 0; device < opened; device++)
        if (address - devices[device].base < devices[device].size) return device;
    return managed.base && address - managed.base < managed.size ? DRY_IS_MANAGED : DRY_NOT_DEVICE;
}

dry_span *dry_space_find(uintptr_t address, int *device) {
    int where = dry_space_device_of(address);
    if (device != NULL) *device = where;
    if (where == DRY_NOT_DEVICE) return NULL;
    return dry_spans_find(where == DRY_IS_MANAGED ? &managed.spans : &devices[where].spans, address);
}

uintptr_t dry_space_base(int device) { return devices[device].base; }
size_t dry_space_size(int device) { return devices[device].size; }

/* Returns the whole pages within a range, and sets the bytes of the range before and after them to zero. */
static int whole_pages(uintptr_t base, size_t size, uintptr_t *first, size_t *bytes) {
    static size_t page;
    if (page == 0) page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t last = (base + size) / page * page;
    *first = DRY_ROUND_UP(base, page);
    if (*first >= last) {
        memset((void *)base, 0, size);
        return 0;
    }
    *bytes = last - *first;
    memset((void *)base, 0, *first - base);
    memset((void *)last, 0, base + size - last);
    return 1;
}

void dry_space_discard(uintptr_t base, size_t size) {
    uintptr_t first;
    size_t bytes;
    if (!whole_pages(base, size, &first, &bytes)) return;
    /* MADV_DONTNEED does not free the pages of a sparse file. MADV_REMOVE does, and fails for private memory. */
    if (madvise((void *)first, bytes, MADV_REMOVE) != 0) madvise((void *)first, bytes, MADV_DONTNEED);
}

int dry_host_discard(uintptr_t base, size_t size) {
    uintptr_t first;
    size_t bytes;
    if (!whole_pages(base, size, &first, &bytes)) return 1;
    /* MADV_FREE succeeds only for private anonymous memory, for which MADV_DONTNEED then gives zeros. */
    return madvise((void *)first, bytes, MADV_FREE) == 0 && madvise((void *)first, bytes, MADV_DONTNEED) == 0;
}

void *dry_map_host(size_t size) {
    void *got = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return got == MAP_FAILED ? NULL : got;
}

void *dry_map_fixed(uintptr_t address, size_t size) {
    void *got = reserve(address, size);
    return got != NULL ? got : reserve(0, size);
}

uintptr_t dry_managed_take(size_t size, int device) {
    size_t rounded = DRY_ROUND_UP(size, DRY_PAGE);
    if (!open_space(&managed, FIRST_ADDRESS + ALL_DEVICES, MANAGED_BYTES, (size_t)1 << 36, "managed memory")) return 0;
    uintptr_t base = dry_spans_first_fit(&managed.spans, managed.base, managed.base + managed.size, rounded, DRY_PAGE);
    dry_span span = {.base = base, .size = rounded, .counted = size, .device = device};
    return base && dry_spans_insert(&managed.spans, span) ? base : 0;
}

int dry_managed_release(uintptr_t base, dry_span *removed) {
    if (!dry_spans_remove(&managed.spans, base, removed)) return 0;
    dry_space_discard(removed->base, removed->size);
    return 1;
}
