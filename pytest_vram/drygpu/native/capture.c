/* Tells which device a stream belongs to, and which capture its work is added to. */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "stream.h"

int dry_is_default(cudaStream_t stream) {
    return stream == NULL || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

struct dry_capture *dry_capture_of(cudaStream_t stream) {
    if (dry_is_default(stream)) return NULL;
    struct dry_capture *capture = stream->capture;
    return capture != NULL && capture->active ? capture : NULL;
}

int dry_is_capturing(cudaStream_t stream) {
    struct dry_capture *capture = dry_capture_of(stream);
    if (capture != NULL) capture->graph->nodes++;
    return capture != NULL;
}

void dry_join_capture(cudaStream_t stream, struct dry_capture *capture) {
    if (!dry_is_default(stream)) stream->capture = capture;
}

int dry_stream_device(cudaStream_t stream) { return dry_is_default(stream) ? dry_current_device() : stream->device; }
