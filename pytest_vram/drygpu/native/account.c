/* Who holds how much: the figures that everything else is checked against, and a journal of how they came about. */
#include "dry.h"

#include <string.h>

typedef struct {
    uint64_t used, peak; /* device memory with the context */
    uint64_t context;
    int has_context;
    uint64_t allocations, frees, refusals;
    uint64_t managed, managed_peak; /* cudaMallocManaged: not the allocator's, and not resident on the card by itself */
} device_account;

typedef struct {
    uint64_t address, bytes;
    int32_t kind, device;
} journal_entry;

#define JOURNAL_ENTRIES 65536

static device_account accounts[DRY_MAX_DEVICES];
static uint64_t host, host_peak, written_entries;
static journal_entry journal[JOURNAL_ENTRIES];

void dry_journal(int kind, int device, uintptr_t address, size_t bytes) {
    journal[written_entries++ % JOURNAL_ENTRIES] = (journal_entry){address, bytes, kind, device};
}

int dry_charge(int device, size_t bytes) {
    device_account *a = &accounts[device];
    if (bytes > dry_the_card()->total_bytes - a->used) {
        a->refusals++;
        dry_journal(DRY_JOURNAL_REFUSED, device, 0, bytes);
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
    dry_journal(DRY_JOURNAL_CONTEXT, device, 0, bytes);
    return 1;
}

size_t dry_used_bytes(int device) { return accounts[device].used; }

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
    uint64_t total, used, peak, context, allocations, frees, refusals, managed, managed_peak, host, host_peak;
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
    }
    host_peak = host;
    dry_unlock();
}

/* Copies the entries from number `first` on, as far as they are still kept; returns how many have been written ever. */
uint64_t pytest_vram_dry_journal(uint64_t first, journal_entry *out, uint64_t room, uint64_t *copied) {
    dry_lock();
    if (written_entries > JOURNAL_ENTRIES && first < written_entries - JOURNAL_ENTRIES)
        first = written_entries - JOURNAL_ENTRIES;
    *copied = 0;
    for (uint64_t i = first; i < written_entries && *copied < room; i++)
        out[(*copied)++] = journal[i % JOURNAL_ENTRIES];
    uint64_t total = written_entries;
    dry_unlock();
    return total;
}
