/* Writes what this process holds on each card to a page that another process can read, while this one runs and after it
 * was killed. The pytest plugin names the folder; without it nothing is written. Called with the lock held.
 */
#include "dry.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* probe/live.py reads this struct and must agree with it. Figures are in bytes, cards by their number in the machine. */
typedef struct {
    char magic[8];
    uint64_t began; /* nanoseconds since the machine started */
    struct {
        uint64_t used, peak, context;
    } cards[DRY_MAX_DEVICES];
} live_page;

static live_page *page;
static pid_t owner; /* a forked child gets a page of its own */

static live_page *open_page(void) {
    const char *folder = getenv("PYTEST_VRAM_PROCESSES");
    if (folder == NULL || *folder == 0) return NULL;
    char path[4096];
    snprintf(path, sizeof path, "%s/%d.live", folder, (int)getpid());
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0) return NULL;
    void *made = MAP_FAILED;
    if (ftruncate(file, sizeof(live_page)) == 0)
        made = mmap(NULL, sizeof(live_page), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (made == MAP_FAILED) return NULL;
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    live_page *opened = made;
    opened->began = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    memcpy(opened->magic, "vramdry1", sizeof opened->magic);
    return opened;
}

void dry_publish(int device, uint64_t used, uint64_t peak, uint64_t context) {
    if (owner != getpid()) {
        page = open_page();
        owner = getpid();
    }
    int card = dry_physical_index(device);
    if (page == NULL || card < 0) return;
    page->cards[card].used = used;
    page->cards[card].peak = peak;
    page->cards[card].context = context;
}
