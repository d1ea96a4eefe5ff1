/* Which card this is. Read once from the environment, which is also how child processes inherit it. */
#include "dry.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static dry_card card;
static int physical_count, visible_count;
static int visible[DRY_MAX_DEVICES];
static size_t copy_limit = (size_t)1 << 20;
static pthread_once_t once = PTHREAD_ONCE_INIT;

void dry_uuid(int physical, uint8_t uuid[16]) {
    /* Made from the card, so that two processes agree on it and two cards of one kind differ in the last byte. */
    uint64_t hash = 1469598103934665603ull;
    for (const char *c = card.product; *c; c++) hash = (hash ^ (uint8_t)*c) * 1099511628211ull;
    memset(uuid, 0, 16);
    memcpy(uuid, &hash, sizeof hash);
    memcpy(uuid + 8, "dry", 3);
    uuid[15] = (uint8_t)physical;
}

static int index_of_uuid(const char *text) {
    /* A prefix is enough when it names one card. */
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
        if (index < 0 || index >= physical_count) return; /* as CUDA does: the list ends at the first invalid entry */
        for (int i = 0; i < visible_count; i++)
            if (visible[i] == index) {
                visible_count = 0; /* a card named twice: CUDA shows none */
                return;
            }
        visible[visible_count++] = (int)index;
    }
}

static int known; /* somebody has asked */
int pytest_vram_dry_cards_are_known(void) { return known; }

static void read_environment(void) {
    known = 1;
    const char *text = getenv("PYTEST_VRAM_DRY_CARD");
    if (text == NULL) return; /* no card: every query answers "no device" */
    /* total_bytes|context_bytes|major.minor|multiprocessors|L2 bytes|count|product name; written by drygpu/activate.py
     */
    char product[128] = "";
    int fields = sscanf(text, "%zu|%zu|%d.%d|%d|%d|%d|%127[^\n]", &card.total_bytes, &card.context_bytes, &card.major,
                        &card.minor, &card.multiprocessors, &card.l2_bytes, &physical_count, product);
    if (fields != 8 || physical_count < 1 || physical_count > DRY_MAX_DEVICES) {
        fprintf(stderr, "pytest-vram dry GPU: PYTEST_VRAM_DRY_CARD=%s cannot be read; no device is shown\n", text);
        physical_count = 0;
        return;
    }
    memcpy(card.product, product, sizeof product);
    const char *limit = getenv("PYTEST_VRAM_DRY_COPY_LIMIT");
    if (limit != NULL) copy_limit = strtoull(limit, NULL, 10);
    read_visible();
}

const dry_card *dry_the_card(void) {
    pthread_once(&once, read_environment);
    return &card;
}

int dry_physical_count(void) { return dry_the_card(), physical_count; }
int dry_visible_count(void) { return dry_the_card(), visible_count; }
int dry_physical_index(int index) { return index >= 0 && index < dry_visible_count() ? visible[index] : -1; }
size_t dry_copy_limit(void) { return dry_the_card(), copy_limit; }
void dry_set_copy_limit(size_t bytes) { dry_the_card(), copy_limit = bytes; }
int pytest_vram_dry_device_count(void) { return dry_visible_count(); }
