/* cuDNN's graph API, which attention on compute capability 9.0 and convolutions go through.
 *
 * Descriptors keep what they are given. The heuristic knows one engine, and its plan needs no workspace: what a real
 * plan needs depends on the engine that cuDNN picks on that very card, and is not published. The program is told so
 * once. (What PyTorch's own front end adds for attention's backward pass, it computes itself, and is counted.) Of the
 * older API there is batch norm; recurrent layers say that they are not here.
 */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_INITIALIZED = 1001, BAD_PARAM = 2000, ALLOCATION_FAILED = 1003, NOT_SUPPORTED = 3000 };
enum { /* cudnnBackendAttributeName_t */
       ENGINEHEUR_RESULTS = 202,
       ENGINECFG_ENGINE = 300,
       ENGINECFG_WORKSPACE_SIZE = 303,
       ENGINECFG_SHARED_MEMORY_USED = 304,
       PLAN_WORKSPACE_SIZE = 402,
       PLAN_JSON = 405,
       GRAPH_ENGINE_COUNT = 802,
};

typedef struct attribute {
    struct attribute *next;
    int name, type;
    int64_t count;
    char data[];
} attribute;

typedef struct {
    int type;
    attribute *attributes;
} descriptor;

typedef struct {
    cudaStream_t stream;
} *handle;

int cudnnCreate(handle *made) {
    if (dry_ready() < 0) return NOT_INITIALIZED;
    *made = calloc(1, sizeof **made);
    return *made ? OK : ALLOCATION_FAILED;
}
int cudnnDestroy(handle h) { return free(h), OK; }
int cudnnSetStream(handle h, cudaStream_t stream) { return h->stream = stream, OK; }
int cudnnGetStream(handle h, cudaStream_t *stream) { return *stream = h->stream, OK; }
size_t cudnnGetVersion(void) { return DRY_CUDNN_VERSION; }
int cudnnGetProperty(int which, int *value) {
    static const int parts[] = {DRY_CUDNN_VERSION / 10000, DRY_CUDNN_VERSION / 100 % 100, DRY_CUDNN_VERSION % 100};
    if (which < 0 || which > 2) return BAD_PARAM;
    return *value = parts[which], OK;
}
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(int status) {
    switch (status) {
    case OK: return "CUDNN_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
    case BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
    default: return "CUDNN_STATUS_NOT_SUPPORTED";
    }
}
void cudnnGetLastErrorString(char *text, size_t room) {
    if (text && room) snprintf(text, room, "not supported by the dry GPU");
}

static size_t width(int type) {
    static const unsigned char widths[] = {8, 4, 1, 8, 4, 8, 8, 4, 4, 4,  4, 4, 4, 4, 4, 8, 4,
                                           4, 4, 4, 4, 4, 4, 4, 1, 4, 16, 4, 4, 4, 4, 4, 4};
    return type >= 0 && type < (int)sizeof widths ? widths[type] : 0;
}

int cudnnBackendCreateDescriptor(int type, descriptor **made) {
    *made = calloc(1, sizeof **made);
    if (*made == NULL) return ALLOCATION_FAILED;
    (*made)->type = type;
    return OK;
}

int cudnnBackendDestroyDescriptor(descriptor *d) {
    if (d == NULL) return OK;
    while (d->attributes != NULL) {
        attribute *first = d->attributes;
        d->attributes = first->next;
        free(first);
    }
    free(d);
    return OK;
}

static attribute *find(descriptor *d, int name) {
    attribute *a = d->attributes;
    while (a != NULL && a->name != name) a = a->next;
    return a;
}

int cudnnBackendSetAttribute(descriptor *d, int name, int type, int64_t count, const void *elements) {
    if (d == NULL || width(type) == 0) return BAD_PARAM;
    size_t bytes = (size_t)count * width(type);
    attribute *a = malloc(sizeof *a + bytes);
    if (a == NULL) return ALLOCATION_FAILED;
    *a = (attribute){.next = d->attributes, .name = name, .type = type, .count = count};
    if (elements != NULL) memcpy(a->data, elements, bytes);
    d->attributes = a; /* the newest is found first */
    return OK;
}

static void say_once(void) {
    static int said;
    if (!__atomic_exchange_n(&said, 1, __ATOMIC_RELAXED))
        dry_note("cuDNN execution plans: their workspace is not known and counted as 0 bytes");
}

/* One value of a given width, if there is room for it. */
static int answer(int64_t value, size_t bytes, int64_t room, int64_t *count, void *elements) {
    if (count) *count = 1;
    if (elements && room > 0) memcpy(elements, &value, bytes);
    return OK;
}

int cudnnBackendGetAttribute(descriptor *d, int name, int type, int64_t room, int64_t *count, void *elements) {
    if (d == NULL) return BAD_PARAM;
    switch (name) {
    case ENGINEHEUR_RESULTS: /* the caller brings the descriptors: one of them is used, and holds nothing */
    case ENGINECFG_ENGINE:
        if (count) *count = 1;
        return OK;
    case PLAN_WORKSPACE_SIZE: say_once(); return answer(0, 8, room, count, elements);
    case ENGINECFG_WORKSPACE_SIZE: return answer(0, 8, room, count, elements);
    case ENGINECFG_SHARED_MEMORY_USED: return answer(0, width(type), room, count, elements);
    case GRAPH_ENGINE_COUNT: return answer(1, 8, room, count, elements);
    case PLAN_JSON: {
        static const char text[] = "{}";
        if (count) *count = sizeof text;
        if (elements && room > 0) memcpy(elements, text, (size_t)room < sizeof text ? (size_t)room : sizeof text);
        return OK;
    }
    }
    attribute *a = find(d, name);
    if (a == NULL || a->type != type) { /* lists of notes, knobs and intermediates: there are none */
        if (count) *count = 0;
        return OK;
    }
    if (count) *count = a->count;
    if (elements) memcpy(elements, a->data, (size_t)(a->count < room ? a->count : room) * width(type));
    return OK;
}

int cudnnBackendInitialize(descriptor *d) { return (void)d, OK; }
int cudnnBackendFinalize(descriptor *d) { return d ? OK : BAD_PARAM; }
int cudnnBackendExecute(handle h, descriptor *plan, descriptor *variants) {
    (void)plan, (void)variants;
    dry_count_kernel(h ? h->stream : NULL);
    dry_is_capturing(h ? h->stream : NULL);
    return OK;
}

/* ---- the older API: what batch norm needs ---- */
static int make(void **made) { return (*made = calloc(1, 1)) ? OK : ALLOCATION_FAILED; }
int cudnnCreateTensorDescriptor(void **made) { return make(made); }
int cudnnDestroyTensorDescriptor(void *d) { return free(d), OK; }
int cudnnSetTensorNdDescriptor(void) { return OK; }
int cudnnCreateFilterDescriptor(void **made) { return make(made); }
int cudnnDestroyFilterDescriptor(void *d) { return free(d), OK; }
int cudnnSetFilterNdDescriptor(void) { return OK; }
int cudnnCreateActivationDescriptor(void **made) { return make(made); }
int cudnnDestroyActivationDescriptor(void *d) { return free(d), OK; }
int cudnnSetActivationDescriptor(void) { return OK; }

static int norm_bytes(size_t *bytes) {
    static int said;
    if (!__atomic_exchange_n(&said, 1, __ATOMIC_RELAXED))
        dry_note("cuDNN batch norm: its workspace and reserve are not known and counted as 0 bytes");
    *bytes = 0;
    return OK;
}

int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(handle h, int mode, int ops, void *x, void *z, void *y,
                                                             void *scale, void *activation, size_t *bytes) {
    (void)h, (void)mode, (void)ops, (void)x, (void)z, (void)y, (void)scale, (void)activation;
    return norm_bytes(bytes);
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(handle h, int mode, int ops, void *x, void *y, void *dy, void *dz,
                                                      void *dx, void *scale, void *activation, size_t *bytes) {
    (void)h, (void)mode, (void)ops, (void)x, (void)y, (void)dy, (void)dz, (void)dx, (void)scale, (void)activation;
    return norm_bytes(bytes);
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(handle h, int mode, int ops, void *activation, void *x,
                                                         size_t *bytes) {
    (void)h, (void)mode, (void)ops, (void)activation, (void)x;
    return norm_bytes(bytes);
}
static int kernel(handle h) { return dry_count_kernel(h ? h->stream : NULL), OK; }
int cudnnBatchNormalizationForwardTrainingEx(handle h) { return kernel(h); }
int cudnnBatchNormalizationForwardInference(handle h) { return kernel(h); }
int cudnnBatchNormalizationBackwardEx(handle h) { return kernel(h); }
