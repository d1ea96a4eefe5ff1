/* Convolutions by cuDNN: which plans a card takes, and how large the workspaces of those that are run are.
 *
 * What a card takes is not always what cuDNN names first, so each plan of a convolution that is run is told as an
 * assumption, with its workspace. Python derives from the largest one how far off a figure may be.
 */
#include "dnn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { /* cudnnBackendAttributeName_t and cudnnBackendAttributeType_t */
       PLAN_WORKSPACE_SIZE = 402,
       PLAN_JSON = 405,
       TYPE_INT64 = 3,
       TYPE_CHAR = 24,
};

typedef struct {
    const void *plan;
    uint64_t workspace; /* all of it, `unsaid` included */
    uint64_t unsaid;    /* the part that the plan does not name */
} convolution;

static struct {
    convolution *made; /* the plans that exist */
    size_t count, room;
} convolutions;

/* The one that was run last. It is told when another one runs or when the notes are read, because cudnn.benchmark runs
 * each plan to time it, and those workspaces are not the convolution's own. */
static convolution last;

static size_t place_of(const void *plan) {
    size_t i = 0;
    while (i < convolutions.count && convolutions.made[i].plan != plan) i++;
    return i;
}

static void keep(convolution new) {
    dry_lock();
    if (convolutions.count == convolutions.room) {
        size_t room = 2 * convolutions.room + 64;
        convolution *more = realloc(convolutions.made, room * sizeof *more);
        if (more != NULL) convolutions.made = more, convolutions.room = room;
    }
    if (convolutions.count < convolutions.room) convolutions.made[convolutions.count++] = new;
    dry_unlock();
}

uint64_t dry_dnn_unsaid(const void *plan) {
    dry_lock();
    size_t i = place_of(plan);
    uint64_t found = i < convolutions.count ? convolutions.made[i].unsaid : 0;
    dry_unlock();
    return found;
}

void dry_dnn_drop(const void *plan) {
    dry_lock();
    size_t i = place_of(plan);
    if (i < convolutions.count) convolutions.made[i] = convolutions.made[--convolutions.count];
    dry_unlock();
}

static void tell(uint64_t workspace) {
    dry_note_of("cuDNN convolutions: their plans and workspaces are those that cuDNN names without a device; on a card "
                "fp32 networks took others, and no other type was measured",
                workspace);
}

void dry_dnn_executed(const void *plan) {
    dry_lock();
    size_t i = place_of(plan);
    convolution before = last, now = i < convolutions.count ? convolutions.made[i] : (convolution){0};
    if (now.plan != NULL) last = now;
    dry_unlock();
    if (now.plan == NULL) return;
    tell(0); /* counts the assumption now, even though the size of its workspace follows later */
    if (before.plan != NULL && before.plan != now.plan) tell(before.workspace);
}

void dry_dnn_timed(void) {
    dry_lock();
    last = (convolution){0};
    dry_unlock();
    if (dry_dnn_is_real())
        dry_note("cuDNN plans were timed (cudnn.benchmark): the first that its heuristic names is taken");
    else
        dry_note("cuDNN execution plans that were timed (cudnn.benchmark): a card allocates the largest workspace of all "
                 "plans that it times, and here it counts as 0 bytes");
}

/* Tells the workspace of the plan that was run last; drygpu/driver.py calls this before it reads the assumptions. */
void pytest_vram_dry_settle(void) {
    dry_lock();
    convolution before = last;
    last = (convolution){0};
    dry_unlock();
    if (before.plan != NULL) tell(before.workspace);
}

/* Whether a plan is that of a weight gradient in fp32, on a card like the one on which these were measured. */
static int is_measured_gradient(const char *json) {
    static const char filter[] = "\"finalizeMode\":\"CONV_BWD_FILTER\"", key[] = "\"dataType\":",
                      value[] = "\"CUDNN_DATA_FLOAT\"";
    const char *type = strstr(json, key);
    return dry_the_card()->major == 9 && strstr(json, filter) != NULL && type != NULL &&
           strncmp(type + strlen(key), value, strlen(value)) == 0;
}

/* The number that follows `key` in a plan's text; 0 if the text has no such key. */
static int number_after(const char *json, const char *key) {
    const char *at = strstr(json, key);
    return at ? atoi(at + strlen(key)) : 0;
}

static void tell_as_measured(void) {
    dry_note("cuDNN weight gradients in fp32: their plans are chosen, and have buffers for partial sums, as on one card of "
             "compute capability 9.0, not as cuDNN's heuristic ranks and describes them");
}

/* On an H200 the weight gradients of fp32 convolutions were not computed by the engines that the heuristic names first:
 * the number and size of the allocations are those of the next ones (cuDNN 9.19, three networks). The reason is not
 * known, so the program is told. */
static int is_passed_over(const char *json) {
    int engine = number_after(json, "\"engineId\":");
    int found = is_measured_gradient(json) && (engine == 67 || engine == 68);
    if (found) tell_as_measured();
    return found;
}

/* A weight gradient may be a sum of several parts that are computed at the same time. Newer engines name the buffers of
 * the parts (SPLIT_K_BUF) and count them in the workspace. Older ones only name the number of parts, and on an H200 their
 * workspace was larger by one weight: 9 MiB for one of 512 x 512 x 3 x 3 in VGG-16. */
static uint64_t partial_sum_bytes(const char *json) {
    const char *at = strstr(json, "\"dW\":\"");
    if (at == NULL || !is_measured_gradient(json) || number_after(json, "\"CUDNN_KNOB_TYPE_SPLIT_K\":") < 2) return 0;
    char name[64];
    snprintf(name, sizeof name, "\"name\":\"%d\"", atoi(at + strlen("\"dW\":\"")));
    static const char sizes[] = "\"dim\":[";
    const char *tensor = strstr(json, name);
    if (tensor == NULL || (tensor = strstr(tensor, sizes)) == NULL) return 0;
    tell_as_measured();
    uint64_t bytes = sizeof(float);
    char *end = (char *)tensor + strlen(sizes) - 1;
    do bytes *= strtoull(end + 1, &end, 10);
    while (*end == ',');
    return bytes;
}

/* Looks at a plan that the installed cuDNN has just made; returns whether a card would take it. */
int dry_dnn_takes(void *plan) {
    enum { ROOM = 1 << 17 };
    int (*get)(void *, int, int, int64_t, int64_t *, void *) = dry_dnn_function("cudnnBackendGetAttribute");
    char *json = calloc(1, ROOM);
    int64_t written, workspace = 0;
    int taken = 1;
    if (json != NULL && get(plan, PLAN_JSON, TYPE_CHAR, ROOM - 1, &written, json) == DNN_OK &&
        strstr(json, "\"finalizeMode\":\"CONV_") != NULL) {
        taken = !is_passed_over(json);
        uint64_t unsaid = partial_sum_bytes(json);
        if (taken && get(plan, PLAN_WORKSPACE_SIZE, TYPE_INT64, 1, &written, &workspace) == DNN_OK)
            keep((convolution){.plan = plan, .workspace = (uint64_t)workspace + unsaid, .unsaid = unsaid});
    }
    free(json);
    return taken;
}
