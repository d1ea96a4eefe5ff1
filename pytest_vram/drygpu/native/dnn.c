/* cuDNN's handle and versions, and its older API: what batch norm, spatial transformers and CTC loss need. See dnngraph.c
 * for execution plans, dnnrnn.c for recurrent layers. */
#include <cuda_runtime_api.h>

#include "dnnrnn.h"

#include <stdio.h>
#include <stdlib.h>

int cudnnCreate(dnn_handle *made) {
    if (dry_ready() < 0) return DNN_NOT_INITIALIZED;
    *made = calloc(1, sizeof **made);
    return *made ? DNN_OK : DNN_ALLOCATION_FAILED;
}
int cudnnDestroy(dnn_handle h) { return free(h), DNN_OK; }
int cudnnSetStream(dnn_handle h, cudaStream_t stream) { return h->stream = stream, DNN_OK; }
int cudnnGetStream(dnn_handle h, cudaStream_t *stream) { return *stream = h->stream, DNN_OK; }
size_t cudnnGetVersion(void) { return DRY_CUDNN_VERSION; }
int cudnnGetProperty(int which, int *value) {
    static const int parts[] = {DRY_CUDNN_VERSION / 10000, DRY_CUDNN_VERSION / 100 % 100, DRY_CUDNN_VERSION % 100};
    if (which < 0 || which > 2) return DNN_BAD_PARAM;
    return *value = parts[which], DNN_OK;
}
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(int status) {
    switch (status) {
    case DNN_OK: return "CUDNN_STATUS_SUCCESS";
    case DNN_NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
    case DNN_BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
    default: return "CUDNN_STATUS_NOT_SUPPORTED";
    }
}
void cudnnGetLastErrorString(char *text, size_t room) {
    if (text && room) snprintf(text, room, "not supported by the dry GPU");
}

/* ---- the older API: what batch norm needs ---- */
static int make(void **made) { return (*made = calloc(1, 1)) ? DNN_OK : DNN_ALLOCATION_FAILED; }
int cudnnCreateFilterDescriptor(void **made) { return make(made); }
int cudnnDestroyFilterDescriptor(void *d) { return free(d), DNN_OK; }
int cudnnSetFilterNdDescriptor(void) { return DNN_OK; }
int cudnnCreateActivationDescriptor(void **made) { return make(made); }
int cudnnDestroyActivationDescriptor(void *d) { return free(d), DNN_OK; }
int cudnnSetActivationDescriptor(void) { return DNN_OK; }

/* Whole planes of channels (NCHW) take no workspace and no reserve: cuDNN 9.19 says so without a device, and R3D-18 made
 * as many allocations on an H200 as it makes here. Where channels lie last, torch asks for another mode. Its kernel keeps
 * partial sums of 64 channels for each block of threads, if it is like those of that kind that NVIDIA has published. */
enum {
    SPATIAL_PERSISTENT = 2,
    BLOCKS_EACH = 2, /* at most, on a multiprocessor */
    BLOCK_BYTES = 64 * 2 * sizeof(float),
    CHANNEL_BYTES = 4 * sizeof(float),
};

static int norm_bytes(int mode, const dnn_tensor *x, size_t *bytes) {
    size_t blocks = (size_t)dry_the_card()->multiprocessors * BLOCKS_EACH, channels = (size_t)x->sizes[1];
    if (mode == SPATIAL_PERSISTENT)
        dry_note_of("cuDNN batch norm of channels_last: its workspace and reserve are not known and counted as 0 bytes",
                    blocks * BLOCK_BYTES + channels * CHANNEL_BYTES);
    *bytes = 0;
    return DNN_OK;
}

int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(dnn_handle h, int mode, int ops, const dnn_tensor *x,
                                                             void *z, void *y, void *scale, void *activation,
                                                             size_t *bytes) {
    (void)h, (void)ops, (void)z, (void)y, (void)scale, (void)activation;
    return norm_bytes(mode, x, bytes);
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(dnn_handle h, int mode, int ops, const dnn_tensor *x, void *y,
                                                      void *dy, void *dz, void *dx, void *scale, void *activation,
                                                      size_t *bytes) {
    (void)h, (void)ops, (void)y, (void)dy, (void)dz, (void)dx, (void)scale, (void)activation;
    return norm_bytes(mode, x, bytes);
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(dnn_handle h, int mode, int ops, void *activation,
                                                         const dnn_tensor *x, size_t *bytes) {
    (void)h, (void)ops, (void)activation;
    return norm_bytes(mode, x, bytes);
}
static int kernel(dnn_handle h) { return dry_count_kernel(h ? h->stream : NULL), DNN_OK; }
int cudnnBatchNormalizationForwardTrainingEx(dnn_handle h) { return kernel(h); }
int cudnnBatchNormalizationForwardInference(dnn_handle h) { return kernel(h); }
int cudnnBatchNormalizationBackwardEx(dnn_handle h) { return kernel(h); }

/* ---- spatial transformers (affine_grid, grid_sample): they take no workspace ---- */
int cudnnCreateSpatialTransformerDescriptor(void **made) { return make(made); }
int cudnnDestroySpatialTransformerDescriptor(void *d) { return free(d), DNN_OK; }
int cudnnSetSpatialTransformerNdDescriptor(void) { return DNN_OK; }
int cudnnSpatialTfGridGeneratorForward(dnn_handle h) { return kernel(h); }
int cudnnSpatialTfGridGeneratorBackward(dnn_handle h) { return kernel(h); }
int cudnnSpatialTfSamplerForward(dnn_handle h) { return kernel(h); }
int cudnnSpatialTfSamplerBackward(dnn_handle h) { return kernel(h); }

/* ---- CTC loss ---- */
int cudnnCreateCTCLossDescriptor(void **made) { return make(made); }
int cudnnDestroyCTCLossDescriptor(void *d) { return free(d), DNN_OK; }
int cudnnSetCTCLossDescriptor(void) { return DNN_OK; }
int cudnnSetCTCLossDescriptorEx(void) { return DNN_OK; }
int cudnnSetCTCLossDescriptor_v8(void) { return DNN_OK; }
int cudnnSetCTCLossDescriptor_v9(void) { return DNN_OK; }

/* The forward and backward variables of the recursion are at most as many as the probabilities if the labels are no
 * longer than half of them. */
static int loss_bytes(const dnn_tensor *probabilities, size_t *bytes) {
    uint64_t size = sizeof(float);
    for (int i = 0; i < probabilities->rank; i++) size *= (uint64_t)probabilities->sizes[i];
    dry_note_of("cuDNN CTC loss: its workspace is not known and counted as 0 bytes", size);
    *bytes = 0;
    return DNN_OK;
}
int cudnnGetCTCLossWorkspaceSize(dnn_handle h, const dnn_tensor *probabilities, void *gradients, const int *labels,
                                 const int *label_lengths, const int *input_lengths, int algorithm, void *loss,
                                 size_t *bytes) {
    (void)h, (void)gradients, (void)labels, (void)label_lengths, (void)input_lengths, (void)algorithm, (void)loss;
    return loss_bytes(probabilities, bytes);
}
int cudnnGetCTCLossWorkspaceSize_v8(dnn_handle h, int algorithm, void *loss, const dnn_tensor *probabilities,
                                    void *gradients, size_t *bytes) {
    (void)h, (void)algorithm, (void)loss, (void)gradients;
    return loss_bytes(probabilities, bytes);
}
int cudnnCTCLoss(dnn_handle h) { return kernel(h); }
int cudnnCTCLoss_v8(dnn_handle h) { return kernel(h); }
