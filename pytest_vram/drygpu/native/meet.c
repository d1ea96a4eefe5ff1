/* Lets the ranks of a communicator exchange two numbers: each writes its own, and reads those of the others.
 *
 * This is needed where NCCL itself lets ranks agree: a split's new communicator has as many ranks as chose its colour.
 * The ranks are processes of one machine, so a file in shared memory is enough. Its name comes from the communicator's id.
 */
#include "dry.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    int32_t there, colour, key, padding;
} seat;

/* Reads the variable as drygpu/values/exchange.py does. */
static double patience(void) {
    const char *text = getenv("PYTEST_VRAM_RANKS_TIMEOUT");
    double seconds = text != NULL ? strtod(text, NULL) : 0;
    return seconds > 0 ? seconds : 300;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static uint64_t hash(const char *text) {
    uint64_t value = 1469598103934665603ull;
    for (; *text; text++) value = (value ^ (uint8_t)*text) * 1099511628211ull;
    return value;
}

/* Fills colours and keys of all `size` ranks. Returns 0 if it cannot be done, or if a rank did not come in time. */
int dry_meet(const char *where, int size, int rank, int colour, int key, int *colours, int *keys) {
    char path[96];
    snprintf(path, sizeof path, "/dev/shm/pytest-vram-%016llx", (unsigned long long)hash(where));
    size_t bytes = (size_t)size * sizeof(seat) + sizeof(int32_t);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) return 0;
    seat *seats = MAP_FAILED;
    if (ftruncate(file, (off_t)bytes) == 0) seats = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (seats == MAP_FAILED) return 0;
    int32_t *gone = (int32_t *)(seats + size);
    seats[rank].colour = colour;
    seats[rank].key = key;
    __atomic_store_n(&seats[rank].there, 1, __ATOMIC_RELEASE);
    double began = now(), limit = patience();
    int missing = 0;
    for (int other = 0; other < size && !missing; other++) {
        while (!__atomic_load_n(&seats[other].there, __ATOMIC_ACQUIRE)) {
            if (now() - began > limit) {
                missing = 1;
                break;
            }
            struct timespec pause = {0, 500000};
            nanosleep(&pause, NULL);
        }
        colours[other] = seats[other].colour;
        keys[other] = seats[other].key;
    }
    if (missing) {
        char absent[512] = "";
        for (int other = 0, used = 0; other < size && used < (int)sizeof absent - 16; other++)
            if (!__atomic_load_n(&seats[other].there, __ATOMIC_ACQUIRE))
                used += snprintf(absent + used, sizeof absent - (size_t)used, " %d", other);
        fprintf(stderr,
                "pytest-vram dry GPU: rank %d waited %g s in ncclCommSplit for rank%s of its communicator "
                "(PYTEST_VRAM_RANKS_TIMEOUT sets the seconds)\n",
                rank, limit, absent);
    }
    if (__atomic_add_fetch(gone, 1, __ATOMIC_ACQ_REL) == size || missing) unlink(path);
    munmap(seats, bytes);
    return !missing;
}
