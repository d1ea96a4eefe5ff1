/* Keeps a made-up time of the host and of the streams, which follows from the work that the program gives them.
 *
 * A block that several streams use is free for reuse when the last of them has done its work with it, and PyTorch asks
 * for that with an event. If every event were complete at once, the block would be reused earlier than on a card whose
 * host has run ahead of it. So each piece of work takes as long here as its bytes or operations need at the rates below.
 * Work of one stream runs in order, and a stream waits for the events that it is told to wait for. The host goes on at
 * once, until it waits for the device or the launch queue is full. An event is complete when the host's time has passed
 * the time of the event.
 *
 * Only the order of these times has an effect. All times are in microseconds, and the same in every run.
 */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "stream.h"

/* None of these was measured here. The rates are those that such links and cards generally reach. */
#define HOST_EACH 10.0        /* the host's time for one launch, with the Python code that leads to it */
#define SHORTEST 2.0          /* the device's time for the smallest kernel */
#define LAUNCH_QUEUE 1024     /* unfinished launches of a device; the host waits before a further one */
#define THREAD_BYTES 24.0     /* for a thread of an elementwise kernel: 4 bf16 numbers of each of 3 tensors */
#define HOST_LINK 20e3        /* bytes a microsecond between host and device: 16 lanes of PCIe 4 */
#define RANKS_BY_HOST 5e3     /* bytes a microsecond from card to card through the host's memory, */
#define RANKS_BY_PCIE 10e3    /* over PCIe, */
#define RANKS_SWITCHED 200e3  /* and through a switch */
#define SWITCHED_CHANNELS 16  /* NCCL opens as many or more only through a switch */
#define POLL_MOST 30          /* doublings */

static double host; /* the host's time; its threads give work to the device one after another */
static double defaults[DRY_MAX_DEVICES], last[DRY_MAX_DEVICES]; /* ends of the default stream, and of all streams */
static double queue[DRY_MAX_DEVICES][LAUNCH_QUEUE];
static uint64_t issued[DRY_MAX_DEVICES];

static __thread int gives_work; /* this thread has given work to a device */
static __thread int polls;      /* how often it asked in a row */

static double later(double a, double b) { return a > b ? a : b; }

static double *end_of(dry_stream stream) {
    if (stream == NULL || stream == cudaStreamLegacy || stream == cudaStreamPerThread)
        return &defaults[dry_current_device()];
    return &stream->end;
}

/* What is captured takes its time when the graph is launched. */
static int is_captured(dry_stream stream, double time) {
    struct dry_capture *capture = dry_capture_of(stream);
    if (capture != NULL) capture->graph->work.time += time;
    return capture != NULL;
}

void dry_clock_issue(dry_stream stream) {
    if (is_captured(stream, SHORTEST)) return;
    int device = dry_stream_device(stream);
    dry_lock();
    gives_work = 1, polls = 0;
    double *begun = &queue[device][issued[device]++ % LAUNCH_QUEUE], *end = end_of(stream);
    host = later(host + HOST_EACH, *begun);
    *begun = *end = later(*end, host) + SHORTEST;
    last[device] = later(last[device], *end);
    dry_unlock();
}

void dry_clock_spend(dry_stream stream, double time) {
    if (is_captured(stream, time)) return;
    int device = dry_stream_device(stream);
    dry_lock();
    *end_of(stream) += time;
    last[device] = later(last[device], *end_of(stream));
    dry_unlock();
}

/* ---- what work takes ---- */
static double memory_rate(void) {
    return (double)dry_the_card()->memory_clock_khz * 2 * dry_the_card()->bus_bits / 8 / 1e3;
}

double dry_time_of_threads(uint64_t threads) { return (double)threads * THREAD_BYTES / later(memory_rate(), 1); }

double dry_time_of_copy(int direction, size_t bytes) {
    return direction == DRY_ON_DEVICE ? 2 * (double)bytes / later(memory_rate(), 1) : (double)bytes / HOST_LINK;
}

double dry_time_of_collective(double bytes) {
    int channels = dry_the_card()->ring_channels;
    return bytes / (channels >= SWITCHED_CHANNELS ? RANKS_SWITCHED : channels > 0 ? RANKS_BY_PCIE : RANKS_BY_HOST);
}

/* Operations that the tensor cores of a multiprocessor do in a clock on bf16 (fp16 before 8.0) with sums in fp32. */
double dry_time_of_product(double operations) {
    const dry_card *card = dry_the_card();
    int consumer = (card->major == 8 && card->minor >= 6) || card->major == 12;
    double each = consumer ? 512 : card->major < 8 ? 1024 : card->major == 8 ? 2048 : card->major == 9 ? 4096 : 8192;
    return operations / later(card->multiprocessors * each * card->clock_khz / 1e3, 1);
}

/* ---- waiting ---- */
void dry_clock_wait(double time) {
    dry_lock();
    polls = 0;
    host = later(host, time);
    dry_unlock();
}

void dry_clock_wait_device(int device) { dry_clock_wait(last[device]); }
void dry_clock_wait_stream(dry_stream stream) { dry_clock_wait(dry_clock_end(stream)); }

double dry_clock_end(dry_stream stream) {
    dry_lock();
    double end = *end_of(stream);
    dry_unlock();
    return end;
}

void dry_clock_follow(dry_stream stream, double time) {
    if (is_captured(stream, 0)) return;
    dry_lock();
    *end_of(stream) = later(*end_of(stream), time);
    dry_unlock();
}

/* A thread that asks again and again lets time pass: each question in a row takes twice as long as the one before. A
 * thread that gives the device no work, such as NCCL's watchdog, does not take part: for it, everything is complete. */
int dry_clock_reached(double time) {
    if (!gives_work) return 1;
    dry_lock();
    int reached = time <= host;
    if (!reached) host += (double)(1u << (polls < POLL_MOST ? polls++ : POLL_MOST));
    dry_unlock();
    return reached;
}
