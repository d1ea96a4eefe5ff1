/* The declarations that the files of the dry GPU share. Each file has one subject.
 *
 * The library answers the CUDA runtime, driver, NVML and BLAS calls of an unmodified PyTorch. It counts memory exactly
 * and computes nothing: kernels return at once, and device memory is address space that costs no host memory until a
 * small copy or fill writes to it.
 */
#ifndef PYTEST_VRAM_DRY_H
#define PYTEST_VRAM_DRY_H

#include <stddef.h>
#include <stdint.h>

#define DRY_MAX_DEVICES 64
#define DRY_PAGE ((size_t)2 << 20) /* granularity of physical device memory: 2 MiB on every supported card */
#define DRY_COPY_LIMIT ((size_t)1 << 20) /* larger copies and fills carry no values */
#define DRY_ROUND_UP(n, to) ((((n) + (to) - 1) / (to)) * (to))

/* ---- config.c: which card, how many, which of them this process sees ---- */
typedef struct {
    char product[128]; /* as the driver names it: "NVIDIA GeForce RTX 4080" */
    size_t total_bytes;
    size_t context_bytes; /* what the first context takes */
    size_t first_kernel_bytes, products_bytes, plans_bytes, module_bytes; /* what it grows by: see context.c */
    int major, minor;     /* compute capability */
    int multiprocessors;
    int l2_bytes;
    int clock_khz, memory_clock_khz; /* the highest of the multiprocessors, and of the memory */
    int bus_bits;                    /* width of the memory bus */
    int ring_channels, peer_channels; /* of NCCL between two such cards; 0: they do not reach each other's memory */
} dry_card;

const dry_card *dry_the_card(void);
int dry_physical_count(void);        /* cards in the machine: what NVML sees */
int dry_visible_count(void);         /* after CUDA_VISIBLE_DEVICES */
int dry_physical_index(int visible); /* -1 when there is no such device */
void dry_uuid(int physical, uint8_t uuid[16]);

/* ---- lock.c: one lock for all state; a forked child starts with it open ---- */
void dry_lock(void);
void dry_unlock(void);

/* ---- span.c: sorted, non-overlapping address ranges ---- */
typedef struct {
    uintptr_t base;
    size_t size;
    size_t counted; /* bytes this range counts against the device */
    int kind;       /* each user of spans defines its own kinds */
    int device;
    void *owner;
} dry_span;

typedef struct {
    dry_span *items;
    size_t count, capacity;
} dry_spans;

dry_span *dry_spans_find(const dry_spans *spans, uintptr_t address);
int dry_spans_overlap(const dry_spans *spans, uintptr_t base, size_t size);
int dry_spans_insert(dry_spans *spans, dry_span span); /* 0 when out of host memory */
int dry_spans_remove(dry_spans *spans, uintptr_t base, dry_span *removed);
uintptr_t dry_spans_last_fit(const dry_spans *spans, uintptr_t low, uintptr_t high, size_t size, size_t align);
uintptr_t dry_spans_first_fit(const dry_spans *spans, uintptr_t low, uintptr_t high, size_t size, size_t align);

/* ---- space.c: address space of devices and of managed memory ---- */
enum { DRY_NOT_DEVICE = -1, DRY_IS_MANAGED = -2 };
enum { DRY_SPAN_MALLOC = 1, DRY_SPAN_POOL, DRY_SPAN_VMM, DRY_SPAN_SHARED }; /* kinds of spans on a device */
int dry_space_open(int device); /* 0 on failure, reported on stderr */
uintptr_t dry_space_take(int device, size_t size, size_t align, uintptr_t hint, dry_span span);
int dry_space_release(int device, uintptr_t base, dry_span *removed);
dry_span *dry_space_find(uintptr_t address, int *device);
int dry_space_device_of(uintptr_t address); /* device, DRY_IS_MANAGED or DRY_NOT_DEVICE */
uintptr_t dry_space_base(int device);
size_t dry_space_size(int device);
void dry_space_discard(uintptr_t base, size_t size); /* give the pages back; they read as zeros */
int dry_host_discard(uintptr_t base, size_t size);   /* the same for the program's memory; 0 if it fails */
void *dry_map_host(size_t size);                     /* zeroed, lazily backed host memory, or NULL */
void *dry_map_fixed(uintptr_t address, size_t size); /* the same at that address, if nothing is there */
uintptr_t dry_managed_take(size_t size, int device);
int dry_managed_release(uintptr_t base, dry_span *removed);

/* ---- account.c: how much memory is taken ---- */
int dry_charge_links(int device, size_t bytes); /* NCCL's connections; takes the lock; 0 if they do not fit */
void dry_refund_links(int device, size_t bytes);
int dry_context_create(int device); /* charges the context once; 0 if it does not fit */
int dry_context_exists(int device);
int dry_context_grow(int device, size_t bytes); /* with the lock held; 0 if it does not fit */
int dry_has_room(int device, size_t bytes);
int dry_charge(int device, size_t bytes); /* 0 if the card has less memory left */
void dry_refund(int device, size_t bytes);
size_t dry_used_bytes(int device); /* as the driver reports it: with the context, and with managed memory that fits */
void dry_charge_managed(int device, size_t bytes);
void dry_refund_managed(int device, size_t bytes);
void dry_charge_host(size_t bytes);
void dry_refund_host(size_t bytes);

/* ---- live.c: the same figures, for other processes to read ---- */
void dry_publish(int device, uint64_t used, uint64_t peak, uint64_t context);

/* ---- meet.c: the ranks of a communicator exchange two numbers ---- */
int dry_meet(const char *where, int size, int rank, int colour, int key, int *colours, int *keys);

/* ---- value.c: the few values that device memory carries ---- */
int dry_copy(void *destination, const void *source, size_t bytes); /* any direction; 0: an address is unknown */
int dry_fill(void *destination, const void *pattern, size_t width, size_t count);
void dry_forget(uintptr_t base, size_t bytes);

/* ---- memory.c, pool.c: the allocation calls shared by the runtime and the driver API ---- */
int dry_malloc(int device, size_t bytes, uintptr_t *address); /* cudaError_t values */
int dry_free(uintptr_t address);
int dry_host_alloc(size_t bytes, void **pointer);
int dry_host_free(void *pointer);
int dry_host_find(const void *pointer, void **base, size_t *size); /* whether it is pinned or registered */
int dry_pool_free(dry_span span);

/* ---- exit.c ---- */
void dry_watch_exit(void); /* call it after PyTorch has loaded the C++ runtime */

/* ---- current.c ---- */
int dry_current_device(void);
int dry_open_device(int device);        /* creates its context; cudaError_t */
int dry_set_current_device(int device); /* cudaError_t */
int dry_ready(void);                    /* current device, context created; -1 if none */

/* ---- device.c, attribute.c ---- */
int dry_entry_point(const char *symbol, void **function);
int dry_attribute(int attribute, int device); /* cudaDeviceAttr numbers, shared with CUdevice_attribute */

/* ---- capture.c ---- */
typedef struct CUstream_st *dry_stream;
int dry_is_capturing(dry_stream stream); /* counts one node if the stream is capturing */
int dry_stream_device(dry_stream stream);

/* ---- context.c: what the driver loads when it is first needed ---- */
/* Before a launch; `loaded` has a bit for each device that the kernel's module is on. All return cudaError_t values. */
int dry_load_module(int device, uint64_t *loaded);
int dry_load_products(int device); /* before a matrix product */
int dry_load_plans(int device);    /* before a plan of cuDNN */

/* ---- links.c: what NCCL takes on a card, in bytes ---- */
size_t dry_ring_bytes(int ranks);    /* for the collectives of a communicator of so many ranks */
size_t dry_peer_bytes(int receives); /* for receiving from one other rank, or for sending to it */

/* ---- work.c: the work that the program gives to a device ---- */
enum { DRY_HOST_TO_HOST = -1, DRY_TO_DEVICE, DRY_TO_HOST, DRY_ON_DEVICE, DRY_DIRECTIONS };
typedef struct {
    uint64_t kernels, graphs, fills, waits;
    uint64_t copies[DRY_DIRECTIONS], copied_bytes[DRY_DIRECTIONS];
    double time; /* of a graph: see clock.c */
} dry_work;
void dry_count_kernel(dry_stream stream);
void dry_count_fill(size_t bytes, dry_stream stream);
void dry_count_copy(int direction, size_t bytes, dry_stream stream);
void dry_count_graph(const dry_work *graph, dry_stream stream);
void dry_count_wait(int device);                 /* the host waits for the device, or for an event on it */
void dry_count_stream_wait(dry_stream stream);   /* the same for a stream */
void dry_count_blocking_copy(dry_stream stream); /* the same, by a copy just counted */

/* ---- clock.c: the made-up time, in microseconds, that tells which events are complete ---- */
void dry_clock_issue(dry_stream stream);               /* the host gives the stream work of the shortest time */
void dry_clock_spend(dry_stream stream, double time);  /* adds to the time of the latest work */
double dry_clock_end(dry_stream stream);               /* when all work of the stream will be done */
void dry_clock_follow(dry_stream stream, double time); /* the stream's next work begins after this */
void dry_clock_wait(double time);                     /* the host waits */
void dry_clock_wait_device(int device);
void dry_clock_wait_stream(dry_stream stream);
int dry_clock_reached(double time); /* whether this time is over for the host */
double dry_time_of_threads(uint64_t threads);
double dry_time_of_copy(int direction, size_t bytes);
double dry_time_of_collective(double bytes); /* for the bytes that one rank sends */
double dry_time_of_product(double operations);

/* ---- launch.c ---- */
uint64_t dry_launch_count(void); /* how many kernels were launched so far */
int dry_launch(const void *function, unsigned block_threads, uint64_t blocks, size_t shared_bytes, dry_stream stream);

/* ---- error.c ---- */
int dry_fail(int error); /* remembers a runtime error for cudaGetLastError and returns it */
const char *dry_error_name(int error);
const char *dry_error_text(int error);
int dry_not_implemented(const char *name, int status);
const char *dry_not_implemented_text(const char *name);
int dry_note(const char *text);                    /* counts an assumption; a literal "name: text" */
int dry_note_of(const char *text, uint64_t bytes); /* the same, about a block of so many bytes */

#endif
