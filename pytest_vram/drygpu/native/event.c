/* Implements events. The made-up time of clock.c tells when they are complete. */
#include <cuda_runtime_api.h>

#include "dnn.h"
#include "dry.h"
#include "stream.h"

#include <stdlib.h>

/* Between two events each kernel takes the same made-up time. So an autotuner, which chooses by timing, makes the same
 * choice in each run: the candidate with the fewest kernels, and the first of equal ones. */
#define MILLISECONDS_AT_LEAST 0.001
#define MILLISECONDS_EACH 0.005

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
