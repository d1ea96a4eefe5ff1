/* Counts the memory that is taken of each card, of managed memory and of the host. Every other figure is checked
 * against these counts. */
#include "dry.h"

#include <string.h>

typedef struct {
    uint64_t used, peak; /* device memory with the context */
    uint64_t context;
    int has_context;
    uint64_t allocations, frees, refusals;
    uint64_t links, links_peak, links_refusals; /* the part of `used` that NCCL's connections take */
    uint64_t managed, managed_peak; /* cudaMallocManaged: it may leave the card, and the allocator does not count it */
} device_account;

static device_account accounts[DRY_MAX_DEVICES];
static uint64_t host, host_peak;

int dry_has_room(int device, size_t bytes) { return bytes <= dry_the_card()->total_bytes - accounts[device].used; }

int dry_charge(int device, size_t bytes) {
    device_account *a = &accounts[device];
    if (!dry_has_room(device, bytes)) {
        a->refusals++;
        return 0;
    }
    a->used += bytes;
    a->allocations++;
    if (a->used > a->peak) a->peak = a->used;
    dry_publish(device, a->used, a->peak, a->context);
    return 1;
}

void dry_refund(int device, size_t bytes) {
    device_account *a = &accounts[device];
    a->used -= bytes;
    a->frees++;
    dry_publish(device, a->used, a->peak, a->context);
}

int dry_charge_links(int device, size_t bytes) {
    device_account *a = &accounts[device];
    dry_lock();
    int fits = dry_charge(device, bytes);
    if (fits)
        a->links += bytes;
    else
        a->links_refusals++;
    if (a->links > a->links_peak) a->links_peak = a->links;
    dry_unlock();
    return fits;
}

void dry_refund_links(int device, size_t bytes) {
    dry_lock();
    dry_refund(device, bytes);
    accounts[device].links -= bytes;
    dry_unlock();
}

int dry_context_exists(int device) { return accounts[device].has_context; }

int dry_context_create(int device) {
    device_account *a = &accounts[device];
    if (a->has_context) return 1;
    size_t bytes = dry_the_card()->context_bytes;
    if (!dry_space_open(device)) return 0;
    dry_watch_exit();
    if (bytes > dry_the_card()->total_bytes - a->used) return 0;
    a->has_context = 1;
    a->context = bytes;
    a->used += bytes;
    if (a->used > a->peak) a->peak = a->used;
    dry_publish(device, a->used, a->peak, a->context);
    return 1;
}

int dry_context_grow(int device, size_t bytes) {
    device_account *a = &accounts[device];
    if (bytes > dry_the_card()->total_bytes - a->used) {
        a->refusals++;
        return 0;
    }
    a->context += bytes;
    a->used += bytes;
    if (a->used > a->peak) a->peak = a->used;
    return 1;
}

/* Returns what the driver reports as taken. Managed memory counts while it fits, because it is on the card then. */
size_t dry_used_bytes(int device) {
    const device_account *a = &accounts[device];
    size_t room = dry_the_card()->total_bytes - a->used;
    return a->used + (a->managed < room ? a->managed : room);
}

void dry_charge_managed(int device, size_t bytes) {
    device_account *a = &accounts[device];
    a->managed += bytes;
    if (a->managed > a->managed_peak) a->managed_peak = a->managed;
}

void dry_refund_managed(int device, size_t bytes) { accounts[device].managed -= bytes; }

void dry_charge_host(size_t bytes) {
    host += bytes;
    if (host > host_peak) host_peak = host;
}

void dry_refund_host(size_t bytes) { host -= bytes; }

/* ---- read by drygpu/driver.py ---- */
typedef struct {
    uint64_t total, used, peak, context, allocations, frees, refusals, managed, managed_peak, links_peak,
        links_refusals, host, host_peak;
} pytest_vram_dry_stats_t;

int pytest_vram_dry_stats(int device, pytest_vram_dry_stats_t *out) {
    if (device < 0 || device >= dry_visible_count()) return 0;
    dry_lock();
    device_account a = accounts[device];
    *out = (pytest_vram_dry_stats_t){dry_the_card()->total_bytes,
                                     a.used,
                                     a.peak,
                                     a.context,
                                     a.allocations,
                                     a.frees,
                                     a.refusals,
                                     a.managed,
                                     a.managed_peak,
                                     a.links_peak,
                                     a.links_refusals,
                                     host,
                                     host_peak};
    dry_unlock();
    return 1;
}

void pytest_vram_dry_reset_peaks(void) {
    dry_lock();
    for (int device = 0; device < DRY_MAX_DEVICES; device++) {
        accounts[device].peak = accounts[device].used;
        accounts[device].managed_peak = accounts[device].managed;
        accounts[device].links_peak = accounts[device].links;
    }
    host_peak = host;
    dry_unlock();
}
