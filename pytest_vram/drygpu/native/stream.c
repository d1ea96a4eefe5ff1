/* Streams and events. When they are complete, the made-up time of clock.c says; capture has to be remembered here. */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "dnn.h"
#include "stream.h"

#include <stdlib.h>

/* Time is made up, for nothing is computed: each kernel takes as long as any other. So choices by timing, as autotuners
 * make them, are the same in each run: the fewest kernels, and of equals the first. */
#define MILLISECONDS_AT_LEAST 0.001
#define MILLISECONDS_EACH 0.005

/* Streams live at fixed addresses, in the order of their making: the allocator sorts its blocks by the stream's
 * address, so a handle from malloc would make its decisions depend on chance. */
#define FIRST_STREAM 0x0fff00000000ull
#define MOST_STREAMS 65536

static struct CUstream_st *streams;
static struct CUstream_st *unused; /* linked through their capture field, which a dead stream does not need */
static uint64_t made;
static uint64_t next_stream_id = 16; /* 1 and 2 are the default streams */

static struct CUstream_st *new_stream(void) {
    if (streams == NULL) streams = dry_map_fixed(FIRST_STREAM, MOST_STREAMS * sizeof *streams);
    if (unused != NULL) {
        struct CUstream_st *stream = unused;
        unused = (struct CUstream_st *)stream->capture;
        return stream;
    }
    return streams != NULL && made < MOST_STREAMS ? &streams[made++] : NULL;
}
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static int is_default(cudaStream_t stream) {
    return stream == NULL || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

struct dry_capture *dry_capture_of(cudaStream_t stream) {
    if (is_default(stream)) return NULL;
    struct dry_capture *capture = stream->capture;
    return capture != NULL && capture->active ? capture : NULL;
}

int dry_is_capturing(cudaStream_t stream) {
    struct dry_capture *capture = dry_capture_of(stream);
    if (capture != NULL) capture->graph->nodes++;
    return capture != NULL;
}

void dry_join_capture(cudaStream_t stream, struct dry_capture *capture) {
    if (!is_default(stream)) stream->capture = capture;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    dry_lock();
    *stream = new_stream();
    if (*stream)
        **stream = (struct CUstream_st){.device = device,
                                        .flags = flags,
                                        .priority = priority > 0    ? 0
                                                    : priority < -5 ? -5
                                                                    : priority,
                                        .id = ++next_stream_id};
    dry_unlock();
    return dry_fail(*stream ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (is_default(stream)) return dry_fail(cudaErrorInvalidResourceHandle);
    dry_lock();
    stream->capture = (struct dry_capture *)unused;
    unused = stream;
    dry_unlock();
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    return *priority = is_default(stream) ? 0 : stream->priority, cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
    return *flags = is_default(stream) ? 0 : stream->flags, cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) {
    *id = stream == cudaStreamPerThread ? 2 : is_default(stream) ? 1 : stream->id;
    return cudaSuccess;
}

int dry_stream_device(cudaStream_t stream) { return is_default(stream) ? dry_current_device() : stream->device; }

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (dry_capture_of(stream)) return dry_fail(cudaErrorStreamCaptureUnsupported);
    return dry_clock_reached(dry_clock_end(stream)) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (dry_ready() < 0) return dry_fail(cudaErrorNoDevice);
    if (dry_capture_of(stream)) return dry_fail(cudaErrorStreamCaptureUnsupported);
    dry_clock_wait_stream(stream);
    dry_count_stream_wait(stream);
    return dry_fail(cudaSuccess);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)flags;
    if (event == NULL) return dry_fail(cudaErrorInvalidResourceHandle);
    if (event->capture != NULL && event->capture->active) dry_join_capture(stream, event->capture);
    dry_clock_follow(stream, event->time);
    return cudaSuccess;
}

/* Host functions run here and now: all that was queued before them is done. */
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    if (dry_is_capturing(stream)) return cudaSuccess;
    function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags) {
    (void)flags;
    if (dry_capture_of(stream)) return dry_fail(cudaErrorStreamCaptureUnsupported);
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode previous = thread_mode;
    thread_mode = *mode;
    *mode = previous;
    return cudaSuccess;
}

/* ---- events ---- */
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    int device = dry_ready();
    if (device < 0) return dry_fail(cudaErrorNoDevice);
    struct CUevent_st *made = calloc(1, sizeof *made);
    if (made == NULL) return dry_fail(cudaErrorMemoryAllocation);
    made->device = device;
    made->flags = flags;
    *event = made;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (event == NULL) return dry_fail(cudaErrorInvalidResourceHandle);
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    (void)flags;
    if (event == NULL) return dry_fail(cudaErrorInvalidResourceHandle);
    event->launches = dry_launch_count();
    event->plans = dry_dnn_executions();
    event->recorded = 1;
    event->time = dry_clock_end(stream);
    event->capture = dry_capture_of(stream);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event == NULL) return dry_fail(cudaErrorInvalidResourceHandle);
    if (event->capture && event->capture->active) return dry_fail(cudaErrorStreamCaptureUnsupported);
    return dry_clock_reached(event->time) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (event == NULL) return dry_fail(cudaErrorInvalidResourceHandle);
    if (event->capture && event->capture->active) return dry_fail(cudaErrorStreamCaptureUnsupported);
    dry_clock_wait(event->time);
    if (event->recorded) dry_count_wait(event->device);
    return dry_fail(cudaSuccess);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    if (start == NULL || end == NULL || !start->recorded || !end->recorded ||
        ((start->flags | end->flags) & cudaEventDisableTiming))
        return dry_fail(cudaErrorInvalidResourceHandle);
    double kernels = (double)end->launches - (double)start->launches, plans = (double)end->plans - (double)start->plans;
    if (kernels == 0 && plans == 1) dry_dnn_timed();
    *milliseconds = (float)(MILLISECONDS_AT_LEAST + MILLISECONDS_EACH * (kernels + plans));
    return cudaSuccess;
}
