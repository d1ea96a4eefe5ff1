/* Counts the work of each device: kernels, copies, fills, and how often the host waits for it.
 *
 * Work that a stream captures is added to its graph, and counted whenever the graph is launched. A product of cuBLAS, a
 * plan of cuDNN, a solver of cuSOLVER and a collective of NCCL count as one kernel each, which is the least
 * that they launch.
 */
#include "dry.h"
#include "stream.h"

#include <stddef.h>

static dry_work done[DRY_MAX_DEVICES];

/* A copy to pageable memory waits for the stream by itself. PyTorch waits once more right after it, which costs nothing
 * and is not counted again. After any other call in between, the next wait counts. */
static __thread dry_stream waited_for;
static __thread int has_waited;

static void add(uint64_t *to, uint64_t count) { __atomic_add_fetch(to, count, __ATOMIC_RELAXED); }

static dry_work *work_of(dry_stream stream) {
    has_waited = 0;
    struct dry_capture *capture = dry_capture_of(stream);
    return capture != NULL ? &capture->graph->work : &done[dry_stream_device(stream)];
}

void dry_count_kernel(dry_stream stream) {
    add(&work_of(stream)->kernels, 1);
    dry_clock_issue(stream);
}

void dry_count_fill(size_t bytes, dry_stream stream) {
    add(&work_of(stream)->fills, 1);
    dry_clock_issue(stream);
    dry_clock_spend(stream, dry_time_of_copy(DRY_ON_DEVICE, bytes / 2)); /* a fill only writes */
}

void dry_count_copy(int direction, size_t bytes, dry_stream stream) {
    dry_work *work = work_of(stream);
    if (direction == DRY_HOST_TO_HOST || bytes == 0) return;
    add(&work->copies[direction], 1);
    add(&work->copied_bytes[direction], bytes);
    dry_clock_issue(stream);
    dry_clock_spend(stream, dry_time_of_copy(direction, bytes));
}

void dry_count_graph(const dry_work *graph, dry_stream stream) {
    dry_work *work = work_of(stream);
    add(&work->graphs, 1);
    dry_clock_issue(stream);
    dry_clock_spend(stream, graph->time);
    add(&work->kernels, graph->kernels);
    add(&work->fills, graph->fills);
    for (int i = 0; i < DRY_DIRECTIONS; i++) {
        add(&work->copies[i], graph->copies[i]);
        add(&work->copied_bytes[i], graph->copied_bytes[i]);
    }
}

void dry_count_wait(int device) {
    has_waited = 0;
    add(&done[device].waits, 1);
}

void dry_count_stream_wait(dry_stream stream) {
    if (has_waited && waited_for == stream) has_waited = 0;
    else dry_count_wait(dry_stream_device(stream));
}

void dry_count_blocking_copy(dry_stream stream) {
    dry_count_wait(dry_stream_device(stream));
    has_waited = 1;
    waited_for = stream;
    dry_clock_wait_stream(stream);
}

/* ---- read by drygpu/driver.py: the order is that of pytest_vram.memory.Work ---- */
typedef struct {
    uint64_t launches, graph_launches, fills, copies_to_device, copied_to_device_bytes, copies_to_host,
        copied_to_host_bytes, copies_on_device, copied_on_device_bytes, synchronizations;
} pytest_vram_dry_work_t;

int pytest_vram_dry_work(int device, pytest_vram_dry_work_t *out) {
    if (device < 0 || device >= dry_visible_count()) return 0;
    dry_work *w = &done[device];
#define READ(field) __atomic_load_n(&w->field, __ATOMIC_RELAXED)
    *out = (pytest_vram_dry_work_t){
        READ(kernels),
        READ(graphs),
        READ(fills),
        READ(copies[DRY_TO_DEVICE]),
        READ(copied_bytes[DRY_TO_DEVICE]),
        READ(copies[DRY_TO_HOST]),
        READ(copied_bytes[DRY_TO_HOST]),
        READ(copies[DRY_ON_DEVICE]),
        READ(copied_bytes[DRY_ON_DEVICE]),
        READ(waits),
    };
#undef READ
    return 1;
}
