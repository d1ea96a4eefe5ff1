/* Implements streams. The made-up time of clock.c tells when their work is complete. */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "stream.h"

/* Streams get fixed addresses in the order in which they are made, because the allocator sorts its blocks by the
 * stream's address: with addresses from malloc its decisions would differ from run to run. */
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
    if (dry_is_default(stream)) return dry_fail(cudaErrorInvalidResourceHandle);
    dry_lock();
    stream->capture = (struct dry_capture *)unused;
    unused = stream;
    dry_unlock();
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    return *priority = dry_is_default(stream) ? 0 : stream->priority, cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
    return *flags = dry_is_default(stream) ? 0 : stream->flags, cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) {
    *id = stream == cudaStreamPerThread ? 2 : dry_is_default(stream) ? 1 : stream->id;
    return cudaSuccess;
}

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

/* A host function runs at once, because all work queued before it is done. */
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
