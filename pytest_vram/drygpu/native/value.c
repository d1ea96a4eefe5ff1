/* Stores the values of device memory that are known, and copies and fills them.
 *
 * A copy or fill of at most DRY_COPY_LIMIT bytes is carried out, so that a program can read back what it sent. A larger
 * one only marks the range as unknown, so that large tensors cost the host no memory. Kernels compute nothing: a stored
 * value is right until a kernel would change it. Unknown bytes read as zeros.
 */
#include "dry.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GRAIN 512u /* the allocator rounds to this size, so no two tensors share a grain */
#define CHUNK ((size_t)2 << 20)
#define GRAINS (CHUNK / GRAIN)

typedef struct {
    uint64_t known[GRAINS / 64];
} chunk;

static chunk **chunks[DRY_MAX_DEVICES]; /* for each device, one pointer per 2 MiB of its address space */

static chunk *chunk_at(int device, uintptr_t address, int create) {
    if (chunks[device] == NULL) {
        if (!create) return NULL;
        chunks[device] = dry_map_host(dry_space_size(device) / CHUNK * sizeof(chunk *));
        if (chunks[device] == NULL) return NULL;
    }
    chunk **slot = &chunks[device][(address - dry_space_base(device)) / CHUNK];
    if (*slot == NULL && create) *slot = calloc(1, sizeof(chunk));
    return *slot;
}

/* Marks the grains of a range as known (mark = 1) or unknown (0), or leaves them (-1). Returns what they were before:
 * bit 0 is set if some grain was known, bit 1 if some was not. */
static int grains(int device, uintptr_t base, size_t bytes, int mark) {
    int seen = 0;
    uintptr_t origin = dry_space_base(device), end = base + bytes;
    while (base < end) {
        uintptr_t chunk_end = origin + ((base - origin) / CHUNK + 1) * CHUNK;
        uintptr_t stop = chunk_end < end ? chunk_end : end;
        chunk *c = chunk_at(device, base, mark == 1);
        if (c == NULL) {
            seen |= 2;
        } else {
            size_t first = (base - origin) % CHUNK / GRAIN, last = (stop - 1 - origin) % CHUNK / GRAIN;
            for (size_t i = first; i <= last; i++) {
                if (i % 64 == 0 && last - i >= 63) { /* a whole word at once */
                    uint64_t word = c->known[i / 64];
                    seen |= (word ? 1 : 0) | (~word ? 2 : 0);
                    if (mark >= 0) c->known[i / 64] = mark ? ~0ull : 0;
                    i += 63;
                    continue;
                }
                uint64_t bit = 1ull << (i % 64);
                seen |= c->known[i / 64] & bit ? 1 : 2;
                if (mark == 1) c->known[i / 64] |= bit;
                else if (mark == 0) c->known[i / 64] &= ~bit;
            }
        }
        base = stop;
    }
    return seen;
}

/* Sets a range to zeros, without touching pages that were never written. Marks and returns as grains() does. */
static int clear(int device, uintptr_t base, size_t bytes, int mark) {
    int seen = grains(device, base, bytes, mark);
    if (seen & 1) {
        if (bytes <= 65536) memset((void *)base, 0, bytes);
        else dry_space_discard(base, bytes);
    }
    return seen;
}

void dry_forget(uintptr_t base, size_t bytes) {
    int device = dry_space_device_of(base);
    if (device >= 0 && bytes) clear(device, base, bytes, 0);
}

/* ---- reads, which a hook may answer ---- */
typedef int (*read_hook)(uint64_t address, uint64_t bytes, int known, void *destination);

static read_hook hook;

static void read_device(int device, void *destination, uintptr_t source, size_t bytes) {
    int seen = grains(device, source, bytes, -1);
    int known = !(seen & 2), answered = 0;
    if (hook != NULL) {
        read_hook ask = hook;
        dry_unlock(); /* the hook may call functions of this library */
        answered = ask(source, bytes, known, destination);
        dry_lock();
    }
    if (answered) return;
    if (seen & 1) {
        memcpy(destination, (void *)source, bytes);
        return;
    }
    if (bytes <= DRY_COPY_LIMIT || !dry_host_discard((uintptr_t)destination, bytes)) memset(destination, 0, bytes);
}

/* ---- copies and fills ---- */
static void write_device(int device, uintptr_t destination, const void *source, size_t bytes) {
    if (bytes > DRY_COPY_LIMIT) {
        clear(device, destination, bytes, 0);
        return;
    }
    grains(device, destination, bytes, 1);
    memcpy((void *)destination, source, bytes);
}

static void copy_within(int to, uintptr_t destination, int from, uintptr_t source, size_t bytes) {
    /* If a part of the source is unknown, the destination becomes unknown. Unknown bytes must be zeros, because only
     * bytes that are marked as known are ever cleared. */
    if (bytes > DRY_COPY_LIMIT || grains(from, source, bytes, -1) != 1) {
        clear(to, destination, bytes, 0);
        return;
    }
    memmove((void *)destination, (void *)source, bytes);
    grains(to, destination, bytes, 1);
}

int dry_copy(void *destination, const void *source, size_t bytes) {
    if (bytes == 0) return 1;
    dry_lock();
    int to = dry_space_device_of((uintptr_t)destination), from = dry_space_device_of((uintptr_t)source);
    int ok = (to < 0 || dry_space_find((uintptr_t)destination, NULL)) &&
             (from < 0 || dry_space_find((uintptr_t)source, NULL));
    if (ok) {
        if (to >= 0 && from >= 0) copy_within(to, (uintptr_t)destination, from, (uintptr_t)source, bytes);
        else if (to >= 0) write_device(to, (uintptr_t)destination, source, bytes);
        else if (from >= 0) read_device(from, destination, (uintptr_t)source, bytes);
        else memmove(destination, source, bytes);
    }
    dry_unlock();
    return ok;
}

static int is_zero(const void *pattern, size_t width) {
    const char *bytes = pattern;
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, width - 1) == 0; /* each byte is as the one before it */
}

int dry_fill(void *destination, const void *pattern, size_t width, size_t count) {
    size_t bytes = width * count;
    if (bytes == 0) return 1;
    dry_lock();
    uintptr_t base = (uintptr_t)destination;
    int device = dry_space_device_of(base), ok = 1;
    if (device >= 0 && dry_space_find(base, NULL) == NULL) ok = 0;
    else if (device >= 0 && is_zero(pattern, width)) clear(device, base, bytes, 1);
    else if (device >= 0 && bytes > DRY_COPY_LIMIT) clear(device, base, bytes, 0);
    else if (device == DRY_IS_MANAGED && is_zero(pattern, width)) dry_space_discard(base, bytes);
    else {
        if (device >= 0) grains(device, base, bytes, 1);
        for (size_t i = 0; i < count; i++) memcpy((char *)destination + i * width, pattern, width);
    }
    dry_unlock();
    return ok;
}

/* ---- used by drygpu/driver.py ---- */
/* Returns 1 if every byte was written by a copy or fill, 0 if not, and -1 if this is not device memory. */
int pytest_vram_dry_known(uint64_t address, uint64_t bytes) {
    dry_lock();
    int device = dry_space_device_of(address);
    int known = device < 0 || dry_space_find(address, NULL) == NULL
                    ? -1
                    : bytes == 0 || !(grains(device, address, bytes, -1) & 2);
    dry_unlock();
    return known;
}

/* Marks a range as known (1) or unknown (0), for a caller that writes to the address itself. Managed and pinned memory is
 * the program's own memory and has no marks. */
int pytest_vram_dry_mark(uint64_t address, uint64_t bytes, int known) {
    void *base;
    size_t size;
    dry_lock();
    int device = dry_space_device_of(address);
    int ok = device >= 0 && dry_space_find(address, NULL) != NULL;
    if (device < 0) {
        int shared = device == DRY_IS_MANAGED || dry_host_find((const void *)address, &base, &size);
        dry_unlock();
        return shared;
    }
    if (ok && bytes && known) grains(device, address, bytes, 1);
    else if (ok && bytes) clear(device, address, bytes, 0);
    dry_unlock();
    return ok;
}

/* Gives the pages of pinned memory back that hold zeros only, and returns how many bytes those are. Weights that were
 * never there are zeros; a copy of them would take memory in each process that makes one. */
uint64_t pytest_vram_dry_release_zeros(uint64_t address, uint64_t bytes) {
    void *start;
    size_t size;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t at = DRY_ROUND_UP((uintptr_t)address, page), end = ((uintptr_t)address + bytes) / page * page;
    uint64_t released = 0;
    dry_lock();
    int pinned = dry_host_find((const void *)address, &start, &size) != 0;
    dry_unlock();
    while (pinned && at < end) {
        uintptr_t first = at;
        while (at < end && is_zero((const void *)at, page)) at += page;
        if (at > first && dry_host_discard(first, at - first)) released += at - first;
        if (at == first) at += page;
    }
    return released;
}

void pytest_vram_dry_set_read_hook(read_hook function) {
    dry_lock();
    hook = function;
    dry_unlock();
}
