/* Reads the card from an environment variable, once. Child processes inherit the variable, and so the card. */
#include "dry.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static dry_card card;
static int physical_count, visible_count;
static int visible[DRY_MAX_DEVICES];
static pthread_once_t once = PTHREAD_ONCE_INIT;

void dry_uuid(int physical, uint8_t uuid[16]) {
    /* The UUID depends only on the card's name and number, so it is the same in all processes. Cards of one kind differ
     * in the last byte. */
    uint64_t hash = 1469598103934665603ull;
    for (const char *c = card.product; *c; c++) hash = (hash ^ (uint8_t)*c) * 1099511628211ull;
    memset(uuid, 0, 16);
    memcpy(uuid, &hash, sizeof hash);
    memcpy(uuid + 8, "dry", 3);
    uuid[15] = (uint8_t)physical;
}

static int index_of_uuid(const char *text) {
    /* A prefix of a UUID is enough if it matches one card only. */
    int found = -1;
    for (int device = 0; device < physical_count; device++) {
        uint8_t u[16];
        char full[48];
        dry_uuid(device, u);
        snprintf(full, sizeof full, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0],
                 u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
        if (strncmp(full, text, strlen(text)) != 0) continue;
        if (found >= 0) return -1;
        found = device;
    }
    return found;
}

static void read_visible(void) {
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (text == NULL) {
        for (visible_count = 0; visible_count < physical_count; visible_count++) visible[visible_count] = visible_count;
        return;
    }
    char copy[4096];
    snprintf(copy, sizeof copy, "%s", text);
    char *rest = copy, *item;
    while ((item = strsep(&rest, ",")) != NULL && visible_count < DRY_MAX_DEVICES) {
        while (*item == ' ') item++;
        char *end = item;
        long index = strncmp(item, "GPU-", 4) == 0 ? index_of_uuid(item) : strtol(item, &end, 10);
        if (strncmp(item, "GPU-", 4) != 0 && end == item) index = -1;
        if (index < 0 || index >= physical_count) return; /* as in CUDA, the list ends at the first invalid entry */
        for (int i = 0; i < visible_count; i++)
            if (visible[i] == index) {
                visible_count = 0; /* if a card is listed twice, CUDA shows no card */
                return;
            }
        visible[visible_count++] = (int)index;
    }
}

static int known; /* whether the card has been read */
int pytest_vram_dry_cards_are_known(void) { return known; }

static void read_environment(void) {
    known = 1;
    const char *text = getenv("PYTEST_VRAM_DRY_CARD");
    if (text == NULL) return; /* no card: every query answers "no device" */
    /* total_bytes|context_bytes+first kernel+products+plans+module|major.minor|multiprocessors|L2 bytes|clock|memory clock (kHz)|bus width|ring+peer
     * channels|count|product name; written by drygpu/process/activate.py */
    char product[128] = "";
    int fields = sscanf(text, "%zu|%zu+%zu+%zu+%zu+%zu|%d.%d|%d|%d|%d|%d|%d|%d+%d|%d|%127[^\n]", &card.total_bytes, &card.context_bytes,
                        &card.first_kernel_bytes, &card.products_bytes, &card.plans_bytes, &card.module_bytes,
                        &card.major, &card.minor, &card.multiprocessors, &card.l2_bytes, &card.clock_khz,
                        &card.memory_clock_khz, &card.bus_bits, &card.ring_channels, &card.peer_channels,
                        &physical_count, product);
    if (fields != 17 || physical_count < 1 || physical_count > DRY_MAX_DEVICES) {
        fprintf(stderr, "pytest-vram dry GPU: PYTEST_VRAM_DRY_CARD=%s cannot be read; no device is shown\n", text);
        physical_count = 0;
        return;
    }
    memcpy(card.product, product, sizeof product);
    read_visible();
}

const dry_card *dry_the_card(void) {
    pthread_once(&once, read_environment);
    return &card;
}

int dry_physical_count(void) { return dry_the_card(), physical_count; }
int dry_visible_count(void) { return dry_the_card(), visible_count; }
int dry_physical_index(int index) { return index >= 0 && index < dry_visible_count() ? visible[index] : -1; }
int pytest_vram_dry_device_count(void) { return dry_visible_count(); }
