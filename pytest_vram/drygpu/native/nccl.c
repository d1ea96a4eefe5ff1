/* Implements NCCL. A collective is over at once and moves nothing between ranks, so that one process can stand for one of
 * many ranks, and hold what that rank would hold. drygpu/values/exchange.py sends small values from rank to rank. A real
 * communicator has buffers on the card, outside PyTorch's allocator. links.c computes their size. They are taken when
 * NCCL would connect the ranks: at the first collective, and at the first transfer between two ranks.
 */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4 };

enum { NAME_BYTES = 192 };

typedef struct {
    int size, rank, device;
    unsigned splits;       /* how often it was split */
    int in_rings;           /* its ranks are connected for collectives */
    unsigned char *to_peer; /* for each other rank, which of SENDS and RECEIVES are connected */
    size_t taken;           /* on the card, for these connections */
    char name[NAME_BYTES]; /* the same on all its ranks, and unique; empty if the process is alone */
} *communicator;

typedef struct {
    char bytes[128];
} unique_id;

enum { SENDS = 1, RECEIVES = 2 };

/* Called at each collective too, because a test may use a communicator that an earlier test opened. */
static void note_buffers(void) {
    if (dry_ring_bytes(2))
        dry_note("NCCL: large tensors are not moved from rank to rank, and how long that takes is made up; a "
                 "communicator's buffers on the card are counted by NCCL's own rule, for as many channels as it reported "
                 "on machines with such cards");
    else
        dry_note("NCCL: large tensors are not moved from rank to rank, and how long that takes is made up; such cards "
                 "are taken not to reach each other's memory, so that a communicator's buffers are in the host's");
}

static int take(communicator c, size_t bytes) {
    if (bytes == 0) return OK;
    if (!dry_charge_links(c->device, bytes)) return CUDA_ERROR;
    c->taken += bytes;
    return OK;
}

static int connect_rings(communicator c) {
    if (c->in_rings) return OK;
    int status = take(c, dry_ring_bytes(c->size));
    c->in_rings = status == OK;
    return status;
}

static int connect_peer(communicator c, int peer, int direction) {
    if (peer == c->rank || peer < 0 || peer >= c->size) return OK;
    if (c->to_peer == NULL && (c->to_peer = calloc((size_t)c->size, 1)) == NULL) return SYSTEM_ERROR;
    if (c->to_peer[peer] & direction) return OK;
    int status = take(c, dry_peer_bytes(direction == RECEIVES));
    if (status == OK) c->to_peer[peer] |= (unsigned char)direction;
    return status;
}

static int alone; /* this process stands for one rank of many */
void pytest_vram_dry_set_alone(int yes) { alone = yes; }

static int open_communicator(communicator *made, int size, int rank, const char *name) {
    int device = dry_ready();
    if (device < 0) return SYSTEM_ERROR;
    if (size < 1 || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    note_buffers();
    *made = malloc(sizeof **made);
    if (*made == NULL) return SYSTEM_ERROR;
    **made = (__typeof__(**made)){.size = size, .rank = rank, .device = device};
    snprintf((*made)->name, sizeof (*made)->name, "%s", name);
    return OK;
}

int ncclGetVersion(int *version) { return *version = DRY_NCCL_VERSION, OK; }
const char *ncclGetErrorString(int status) {
    return status == OK             ? "no error"
           : status == CUDA_ERROR   ? "out of memory: the card has no room for the buffers of NCCL's connections"
           : status == SYSTEM_ERROR ? "no device or no host memory for a communicator, or a rank did not come: see stderr"
                                    : "not supported by the dry GPU";
}
const char *ncclGetLastError(communicator c) { return (void)c, ""; }

int ncclGetUniqueId(unique_id *id) {
    static int count;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(id, 0, sizeof *id);
    /* The time makes the id unique: a killed process with the same number may have left a file behind. */
    snprintf(id->bytes, sizeof id->bytes, "pytest-vram-dry-%d-%d-%llx%08lx", (int)getpid(),
             __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED), (unsigned long long)now.tv_sec, (unsigned long)now.tv_nsec);
    return OK;
}
int ncclCommGetUniqueId(communicator c, unique_id *id) { return (void)c, ncclGetUniqueId(id); }

int ncclCommInitRank(communicator *made, int size, unique_id id, int rank) {
    return id.bytes[sizeof id.bytes - 1] = 0, open_communicator(made, size, rank, id.bytes);
}
int ncclCommInitRankConfig(communicator *made, int size, unique_id id, int rank, void *config) {
    return (void)config, ncclCommInitRank(made, size, id, rank);
}
int ncclCommInitRankScalable(communicator *made, int size, int rank, int ids, unique_id *id, void *config) {
    return (void)ids, (void)config, ncclCommInitRank(made, size, *id, rank);
}
int ncclCommInitAll(communicator *made, int count, const int *devices) {
    int current = dry_current_device(), status = OK;
    for (int i = 0; i < count && status == OK; i++) {
        dry_set_current_device(devices ? devices[i] : i);
        status = open_communicator(&made[i], count, i, "");
    }
    dry_set_current_device(current);
    return status;
}

/* All ranks of the old communicator call this, each with the colour of its new one, in which they are ordered by key.
 * If this process stands for one of many ranks, or has them all, no other process calls it. The new communicator is then
 * as large as the old one. */
int ncclCommSplit(communicator c, int colour, int key, communicator *made, void *config) {
    (void)config;
    *made = NULL;
    char where[NAME_BYTES + 24];
    snprintf(where, sizeof where, "%s/%u", c->name, ++c->splits);
    if (c->name[0] == 0 || c->size == 1 || alone)
        return colour < 0 ? OK : open_communicator(made, c->size, c->rank, c->name);
    int *colours = calloc((size_t)c->size * 2, sizeof *colours), size = 0, rank = 0, status = SYSTEM_ERROR;
    if (colours == NULL) return SYSTEM_ERROR;
    int *keys = colours + c->size;
    if (dry_meet(where, c->size, c->rank, colour, key, colours, keys)) {
        for (int other = 0; other < c->size; other++) {
            if (colours[other] != colour) continue;
            size++;
            rank += keys[other] < key || (keys[other] == key && other < c->rank);
        }
        char name[NAME_BYTES];
        snprintf(name, sizeof name, "%.150s/%d", where, colour);
        status = colour < 0 ? OK : open_communicator(made, size, rank, name);
    }
    free(colours);
    return status;
}

int ncclCommCount(communicator c, int *count) { return *count = c->size, OK; }
int ncclCommUserRank(communicator c, int *rank) { return *rank = c->rank, OK; }
int ncclCommCuDevice(communicator c, int *device) { return *device = c->device, OK; }
int ncclCommGetAsyncError(communicator c, int *status) { return (void)c, *status = OK, OK; }
int ncclCommFinalize(communicator c) { return (void)c, OK; }
int ncclCommDestroy(communicator c) {
    if (c == NULL) return OK;
    if (c->taken) dry_refund_links(c->device, c->taken);
    return free(c->to_peer), free(c), OK;
}
int ncclCommAbort(communicator c) { return ncclCommDestroy(c); }
int ncclCommMemStats(communicator c, int which, uint64_t *value) { return (void)c, (void)which, *value = 0, OK; }
int ncclCommRegister(communicator c, void *buffer, size_t size, void **handle) {
    return (void)c, (void)size, *handle = buffer, OK;
}
int ncclCommDeregister(communicator c, void *handle) { return (void)c, (void)handle, OK; }
int ncclMemAlloc(void **pointer, size_t size) { return cudaMalloc(pointer, size) == cudaSuccess ? OK : SYSTEM_ERROR; }
int ncclMemFree(void *pointer) { return cudaFree(pointer) == cudaSuccess ? OK : SYSTEM_ERROR; }
int ncclRedOpCreatePreMulSum(int *op, void *scalar, int type, int residence, communicator c) {
    return (void)scalar, (void)type, (void)residence, (void)c, *op = 5,
                                                               OK; /* the first number past the built-in ones */
}
int ncclRedOpDestroy(int op, communicator c) { return (void)op, (void)c, OK; }

/* ---- collectives: every other rank is assumed to call them with the same sizes ---- */
static size_t width(int type) {
    static const unsigned char widths[] = {1, 1, 4, 4, 8, 8,
                                           2, 4, 8, 2, 1, 1}; /* ncclDataType_t: int8 ... float8e5m2 */
    return type >= 0 && type < (int)sizeof widths ? widths[type] : 4;
}

/* `parts` of so many elements are what one rank sends in a ring. */
static int begin(communicator c, double parts, size_t count, int type, dry_stream stream) {
    note_buffers();
    dry_count_kernel(stream);
    if (c->size > 1) dry_clock_spend(stream, dry_time_of_collective(parts * (double)(count * width(type))));
    return connect_rings(c);
}

static int move(void *to, const void *from, size_t count, int type, dry_stream stream) {
    if (to == from || to == NULL || from == NULL || dry_is_capturing(stream)) return OK;
    return dry_copy(to, from, count * width(type)) ? OK : INVALID_ARGUMENT;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, communicator c, dry_stream stream) {
    int status = begin(c, 2.0 * (c->size - 1) / c->size, count, type, stream);
    return (void)op, status == OK ? move(to, from, count, type, stream) : status;
}
int ncclReduce(const void *from, void *to, size_t count, int type, int op, int root, communicator c,
               dry_stream stream) {
    int status = begin(c, 1, count, type, stream);
    return (void)op, status == OK && root == c->rank ? move(to, from, count, type, stream) : status;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, communicator c, dry_stream stream) {
    int status = begin(c, 1, count, type, stream);
    return status == OK && root == c->rank ? move(to, from, count, type, stream) : status;
}
int ncclAllGather(const void *from, void *to, size_t count, int type, communicator c, dry_stream stream) {
    int status = begin(c, c->size - 1, count, type, stream);
    for (int rank = 0; rank < c->size && status == OK; rank++)
        status = move((char *)to + (size_t)rank * count * width(type), from, count, type, stream);
    return status;
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, communicator c, dry_stream stream) {
    int status = begin(c, c->size - 1, count, type, stream);
    if (status != OK) return status;
    return (void)op, move(to, (const char *)from + (size_t)c->rank * count * width(type), count, type, stream);
}
int ncclBcast(void *buffer, size_t count, int type, int root, communicator c, dry_stream stream) { /* in place */
    return (void)buffer, (void)root, begin(c, 1, count, type, stream);
}
int ncclGroupStart(void) { return OK; }
int ncclGroupEnd(void) { return OK; }
/* On a card, all transfers between ncclGroupStart and ncclGroupEnd are one kernel. Here each is one. */
static int transfer(size_t bytes, int peer, int direction, communicator c, dry_stream stream) {
    note_buffers();
    dry_count_kernel(stream);
    if (peer != c->rank) dry_clock_spend(stream, dry_time_of_collective((double)bytes));
    return connect_peer(c, peer, direction);
}
int ncclSend(const void *from, size_t count, int type, int peer, communicator c, dry_stream stream) {
    return (void)from, transfer(count * width(type), peer, SENDS, c, stream);
}
int ncclRecv(void *to, size_t count, int type, int peer, communicator c, dry_stream stream) {
    return (void)to, transfer(count * width(type), peer, RECEIVES, c, stream);
}
int ncclAlltoAll(const void *from, void *to, size_t count, int type, communicator c, dry_stream stream) {
    int status = OK;
    note_buffers();
    dry_count_kernel(stream);
    dry_clock_spend(stream, dry_time_of_collective((double)(count * width(type)) * (c->size - 1)));
    for (int peer = 0; peer < c->size && status == OK; peer++) {
        status = connect_peer(c, peer, SENDS);
        if (status == OK) status = connect_peer(c, peer, RECEIVES);
    }
    return status == OK ? move(to, from, count * (size_t)c->size, type, stream) : status;
}
