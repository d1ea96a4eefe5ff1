/* CUDA graphs: captured nodes are counted and not stored, because there is nothing to replay. A graph costs the memory
 * of a private pool of PyTorch's allocator, which works here as on a real card. */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "stream.h"

#include <stdlib.h>

struct CUuserObject_st {
    void *pointer;
    cudaHostFn_t destroy;
    unsigned references;
};

struct CUgraphExec_st {
    size_t nodes;
    dry_work work;
};

static uint64_t next_capture_id;

static cudaError_t begin(cudaStream_t stream, cudaGraph_t graph) {
    if (stream == NULL || stream == cudaStreamLegacy || stream == cudaStreamPerThread)
        return dry_fail(cudaErrorStreamCaptureUnsupported);
    if (dry_capture_of(stream)) return dry_fail(cudaErrorIllegalState);
    struct dry_capture *capture = calloc(1, sizeof *capture);
    if (graph == NULL) graph = calloc(1, sizeof *graph);
    if (capture == NULL || graph == NULL) return dry_fail(cudaErrorMemoryAllocation);
    dry_lock();
    *capture = (struct dry_capture){.active = 1, .id = ++next_capture_id, .origin = stream, .graph = graph};
    dry_unlock();
    stream->capture = capture;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    return (void)mode, begin(stream, NULL);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    struct dry_capture *capture = dry_capture_of(stream);
    *graph = NULL;
    if (capture == NULL) return dry_fail(cudaErrorIllegalState);
    if (capture->origin != stream) return dry_fail(cudaErrorStreamCaptureUnmatched);
    capture->active = 0;
    *graph = capture->graph;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = dry_capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

static cudaError_t capture_info(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                cudaGraph_t *graph, const cudaGraphNode_t **dependencies, size_t *count) {
    struct dry_capture *capture = dry_capture_of(stream);
    *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? capture->graph : NULL;
    if (dependencies) *dependencies = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    if (edges) *edges = NULL;
    return capture_info(stream, status, id, graph, dependencies, count);
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *dependencies,
                                                const cudaGraphEdgeData *edges, size_t count, unsigned flags) {
    (void)stream, (void)dependencies, (void)edges, (void)count, (void)flags;
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies, cudaGraphEdgeData *edges,
                                         size_t *count) {
    (void)node, (void)dependencies, (void)edges;
    *count = 0;
    return cudaSuccess;
}
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                        unsigned long long *id, cudaGraph_t *graph,
                                        const cudaGraphNode_t **dependencies, size_t *count) {
    return capture_info(stream, status, id, graph, dependencies, count);
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *dependencies, size_t count,
                                                unsigned flags) {
    (void)stream, (void)dependencies, (void)count, (void)flags;
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies, size_t *count) {
    (void)node, (void)dependencies;
    *count = 0;
    return cudaSuccess;
}
#endif

cudaError_t cudaGraphCreate(cudaGraph_t *graph, unsigned flags) {
    (void)flags;
    *graph = calloc(1, sizeof **graph);
    return dry_fail(*graph ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    /* A node is only a handle, so any address that is not NULL will do. */
    if (nodes != NULL)
        for (size_t i = 0; i < *count; i++) nodes[i] = i < graph->nodes ? (cudaGraphNode_t)graph : NULL;
    if (nodes == NULL || *count > graph->nodes) *count = graph->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    if (graph == NULL) return dry_fail(cudaErrorInvalidValue);
    *executable = calloc(1, sizeof **executable);
    if (*executable == NULL) return dry_fail(cudaErrorMemoryAllocation);
    (*executable)->nodes = graph->nodes;
    (*executable)->work = graph->work;
    return cudaSuccess;
}

#if CUDART_VERSION >= 12000
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
#endif

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
    return (void)executable, (void)stream, cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    if (executable == NULL) return dry_fail(cudaErrorInvalidResourceHandle);
    dry_count_graph(&executable->work, stream);
    dry_is_capturing(stream);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return free(executable), cudaSuccess; }

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
    if (object == NULL || count > object->references) return dry_fail(cudaErrorInvalidValue);
    object->references -= count;
    if (object->references == 0) {
        object->destroy(object->pointer);
        free(object);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    if (graph == NULL) return dry_fail(cudaErrorInvalidValue);
    while (graph->retained != NULL) {
        struct dry_retained *first = graph->retained;
        graph->retained = first->next;
        cudaUserObjectRelease(first->object, first->count);
        free(first);
    }
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *pointer, cudaHostFn_t destroy, unsigned references,
                                 unsigned flags) {
    (void)flags;
    struct CUuserObject_st *made = malloc(sizeof *made);
    if (made == NULL) return dry_fail(cudaErrorMemoryAllocation);
    *made = (struct CUuserObject_st){pointer, destroy, references};
    *object = made;
    return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
    struct dry_retained *made = malloc(sizeof *made);
    if (made == NULL) return dry_fail(cudaErrorMemoryAllocation);
    if (!(flags & cudaGraphUserObjectMove)) object->references += count;
    *made = (struct dry_retained){graph->retained, object, count};
    graph->retained = made;
    return cudaSuccess;
}

/* Memory that a graph itself allocates (cudaMallocAsync during capture) is not supported, so these report none. */
cudaError_t cudaDeviceGetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) {
    (void)device, (void)attribute;
    *(uint64_t *)value = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceSetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) {
    (void)device, (void)attribute, (void)value;
    return cudaSuccess;
}

cudaError_t cudaDeviceGraphMemTrim(int device) { return (void)device, cudaSuccess; }
