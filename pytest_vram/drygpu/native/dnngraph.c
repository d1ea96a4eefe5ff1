/* cuDNN's graph API, which attention on compute capability 9.0 and convolutions go through.
 *
 * Where the installed cuDNN can be asked without a device (dnnreal.c), its own descriptors, heuristics and plans answer,
 * and so the workspace is the one that a card would need. Each descriptor that would ask a handle for its device gets the
 * device's properties instead, and attributes that name a handle are dropped. Plans are not run.
 *
 * Elsewhere descriptors keep what they are given, the heuristic knows one engine, and its plan needs no workspace; the
 * program is told so once. (PyTorch's front end itself computes what it adds for attention's backward pass. That is
 * counted.)
 */
#include "dnn.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { /* cudnnBackendDescriptorType_t */ ENGINE = 2, ENGINEHEUR = 4, EXECUTION_PLAN = 5, TENSOR = 17 };
enum { /* cudnnBackendAttributeName_t */
       ENGINEHEUR_RESULTS = 202,
       ENGINEHEUR_DEVICEPROP = 204,
       ENGINECFG_ENGINE = 300,
       ENGINECFG_WORKSPACE_SIZE = 303,
       ENGINECFG_SHARED_MEMORY_USED = 304,
       PLAN_HANDLE = 400,
       PLAN_ENGINE_CONFIG = 401,
       PLAN_WORKSPACE_SIZE = 402,
       PLAN_JSON = 405,
       PLAN_DEVICEPROP = 407,
       GRAPH_HANDLE = 800,
       GRAPH_ENGINE_COUNT = 802,
       TENSOR_DATA_TYPE = 901,
       TENSOR_DIMENSIONS = 902,
       TENSOR_IS_VIRTUAL = 907,
       ENGINE_DEVICEPROP = 1307,
};
enum { /* cudnnBackendAttributeType_t */ TYPE_CHAR = 24, TYPE_BACKEND_DESCRIPTOR = 15 };

static uint64_t executions;
uint64_t dry_dnn_executions(void) { return __atomic_load_n(&executions, __ATOMIC_RELAXED); }

/* ---- the installed cuDNN ---- */
static struct {
    int (*create)(int, void **);
    int (*destroy)(void *);
    int (*initialize)(void *);
    int (*finalize)(void *);
    int (*set)(void *, int, int, int64_t, const void *);
    int (*get)(void *, int, int, int64_t, int64_t *, void *);
} real;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int is_real;

static void find_functions(void) {
    real.create = dry_dnn_function("cudnnBackendCreateDescriptor");
    real.destroy = dry_dnn_function("cudnnBackendDestroyDescriptor");
    real.initialize = dry_dnn_function("cudnnBackendInitialize");
    real.finalize = dry_dnn_function("cudnnBackendFinalize");
    real.set = dry_dnn_function("cudnnBackendSetAttribute");
    real.get = dry_dnn_function("cudnnBackendGetAttribute");
    is_real = real.create && real.destroy && real.initialize && real.finalize && real.set && real.get;
}

static int asks_installed(void) {
    pthread_once(&once, find_functions);
    return is_real;
}

static int create_real(int type, void **made) {
    int status = real.create(type, made);
    int attribute = type == ENGINE           ? ENGINE_DEVICEPROP
                    : type == ENGINEHEUR     ? ENGINEHEUR_DEVICEPROP
                    : type == EXECUTION_PLAN ? PLAN_DEVICEPROP
                                             : 0;
    if (status != DNN_OK || attribute == 0) return status;
    const void *properties = dry_dnn_device_properties();
    return real.set(*made, attribute, TYPE_BACKEND_DESCRIPTOR, 1, &properties);
}

/* ---- plans that are being made ---- */
static __thread void *plan; /* of this thread, the one being made */

static int set_real(void *d, int name, int type, int64_t count, const void *elements) {
    if (name == PLAN_HANDLE || name == GRAPH_HANDLE) return DNN_OK;
    if (name == PLAN_ENGINE_CONFIG) plan = d;
    return real.set(d, name, type, count, elements);
}

static int finalize_real(void *d) {
    int status = real.finalize(d), is_plan = d == plan;
    if (is_plan) plan = NULL;
    return status == DNN_OK && is_plan && !dry_dnn_takes(d) ? DNN_NOT_SUPPORTED : status;
}

/* ---- the stand-in ---- */
typedef struct attribute {
    struct attribute *next;
    int name, type;
    int64_t count;
    char data[];
} attribute;

typedef struct {
    int type;
    attribute *attributes;
    uint64_t bytes; /* of a plan: those of the tensors of its operation */
} descriptor;

/* For this thread: the bytes of the tensors described since the last plan was made, and whether a plan used them. */
static __thread struct {
    uint64_t bytes;
    int is_had;
} tensors;

static size_t width(int type) {
    static const unsigned char widths[] = {8, 4, 1, 8, 4, 8, 8, 4, 4, 4,  4, 4, 4, 4, 4, 8, 4,
                                           4, 4, 4, 4, 4, 4, 4, 1, 4, 16, 4, 4, 4, 4, 4, 4};
    return type >= 0 && type < (int)sizeof widths ? widths[type] : 0;
}

int cudnnBackendCreateDescriptor(int type, descriptor **made) {
    if (asks_installed()) return create_real(type, (void **)made);
    *made = calloc(1, sizeof **made);
    if (*made == NULL) return DNN_ALLOCATION_FAILED;
    (*made)->type = type;
    return DNN_OK;
}

int cudnnBackendDestroyDescriptor(descriptor *d) {
    if (d == NULL) return DNN_OK;
    if (asks_installed()) return dry_dnn_drop(d), real.destroy(d);
    while (d->attributes != NULL) {
        attribute *first = d->attributes;
        d->attributes = first->next;
        free(first);
    }
    free(d);
    return DNN_OK;
}

static attribute *find(descriptor *d, int name) {
    attribute *a = d->attributes;
    while (a != NULL && a->name != name) a = a->next;
    return a;
}

int cudnnBackendSetAttribute(descriptor *d, int name, int type, int64_t count, const void *elements) {
    if (asks_installed()) return set_real(d, name, type, count, elements);
    if (d == NULL || width(type) == 0) return DNN_BAD_PARAM;
    size_t bytes = (size_t)count * width(type);
    attribute *a = malloc(sizeof *a + bytes);
    if (a == NULL) return DNN_ALLOCATION_FAILED;
    *a = (attribute){.next = d->attributes, .name = name, .type = type, .count = count};
    if (elements != NULL) memcpy(a->data, elements, bytes);
    d->attributes = a; /* the newest is found first */
    return DNN_OK;
}

/* One value of a given width, if there is room for it. */
static int answer(int64_t value, size_t bytes, int64_t room, int64_t *count, void *elements) {
    if (count) *count = 1;
    if (elements && room > 0) memcpy(elements, &value, bytes);
    return DNN_OK;
}

static void note_plan(const descriptor *d) {
    dry_note_of("cuDNN execution plans: their workspace is not known and counted as 0 bytes", d->bytes);
}

static uint64_t bytes_of(descriptor *tensor) {
    static const unsigned char widths[] = {4, 8, 2, 1, 4, 4, 1, 4, 32, 2, 8, 1, 1, 1}; /* by cudnnDataType_t */
    attribute *dimensions = find(tensor, TENSOR_DIMENSIONS), *type = find(tensor, TENSOR_DATA_TYPE),
              *is_virtual = find(tensor, TENSOR_IS_VIRTUAL);
    if (dimensions == NULL || type == NULL || (is_virtual != NULL && *is_virtual->data)) return 0;
    int32_t number;
    memcpy(&number, type->data, sizeof number);
    uint64_t bytes = number >= 0 && number < (int)sizeof widths ? widths[number] : 4;
    for (int64_t i = 0; i < dimensions->count; i++) {
        int64_t length;
        memcpy(&length, dimensions->data + i * (int64_t)sizeof length, sizeof length);
        bytes *= (uint64_t)length;
    }
    return bytes;
}

static int finalize(descriptor *d) {
    if (d->type == EXECUTION_PLAN) d->bytes = tensors.bytes, tensors.is_had = 1;
    if (d->type != TENSOR) return DNN_OK;
    if (tensors.is_had) tensors.bytes = 0, tensors.is_had = 0;
    tensors.bytes += bytes_of(d);
    return DNN_OK;
}

int cudnnBackendGetAttribute(descriptor *d, int name, int type, int64_t room, int64_t *count, void *elements) {
    if (asks_installed()) {
        int status = real.get(d, name, type, room, count, elements);
        if (status == DNN_OK && name == PLAN_WORKSPACE_SIZE && room > 0 && elements != NULL)
            *(int64_t *)elements += (int64_t)dry_dnn_unsaid(d);
        return status;
    }
    if (d == NULL) return DNN_BAD_PARAM;
    switch (name) {
    case ENGINEHEUR_RESULTS: /* the caller brings the descriptors: one of them is used, and holds nothing */
    case ENGINECFG_ENGINE:
        if (count) *count = 1;
        return DNN_OK;
    case PLAN_WORKSPACE_SIZE:
        note_plan(d);
        return answer(0, 8, room, count, elements);
    case ENGINECFG_WORKSPACE_SIZE: return answer(0, 8, room, count, elements);
    case ENGINECFG_SHARED_MEMORY_USED: return answer(0, width(type), room, count, elements);
    case GRAPH_ENGINE_COUNT: return answer(1, 8, room, count, elements);
    case PLAN_JSON: {
        static const char text[] = "{}";
        if (count) *count = sizeof text;
        if (elements && room > 0) memcpy(elements, text, (size_t)room < sizeof text ? (size_t)room : sizeof text);
        return DNN_OK;
    }
    }
    attribute *a = find(d, name);
    if (a == NULL || a->type != type) { /* lists of notes, knobs and intermediates: there are none */
        if (count) *count = 0;
        return DNN_OK;
    }
    if (count) *count = a->count;
    if (elements) memcpy(elements, a->data, (size_t)(a->count < room ? a->count : room) * width(type));
    return DNN_OK;
}

int cudnnBackendInitialize(descriptor *d) { return asks_installed() ? real.initialize(d) : DNN_OK; }
int cudnnBackendFinalize(descriptor *d) {
    if (d == NULL) return DNN_BAD_PARAM;
    return asks_installed() ? finalize_real(d) : finalize(d);
}
int cudnnBackendExecute(dnn_handle h, descriptor *executed, descriptor *variants) {
    (void)variants;
    /* PyTorch keeps plans: a later test may execute one of an earlier test. */
    if (asks_installed())
        dry_dnn_executed(executed);
    else
        note_plan(executed);
    __atomic_add_fetch(&executions, 1, __ATOMIC_RELAXED);
    dry_is_capturing(h ? h->stream : NULL);
    if (dry_load_plans(dry_current_device()) != 0) return DNN_ALLOCATION_FAILED;
    dry_count_kernel(h ? h->stream : NULL);
    return DNN_OK;
}
