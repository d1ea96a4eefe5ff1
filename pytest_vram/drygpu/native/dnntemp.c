/* Finds out how much workspace and reserve a recurrent layer needs.
 *
 * The installed cuDNN fills in the sizes even if its handle belongs to no device, but this use is not documented. So it
 * is asked in a forked process, which may crash without harm, and the program is told. Without an answer the sizes are
 * computed: the reserve by the formula that such answers follow, and the workspace roughly. The program is told that too.
 */
#include "dnnrnn.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SECONDS = 20, HANDLE_BYTES = 1 << 16, STATE_BYTES = 1 << 24, UNTOUCHED = 1 };

typedef struct {
    size_t workspace, reserve;
} sizes;

/* Runs in the forked process. */
static int ask(const dnn_rnn *d, const dnn_rnn_data *x, int training, sizes *found) {
    int (*make_rnn)(void **) = dry_dnn_function("cudnnCreateRNNDescriptor");
    int (*make_data)(void **) = dry_dnn_function("cudnnCreateRNNDataDescriptor");
    int (*make_dropout)(void **) = dry_dnn_function("cudnnCreateDropoutDescriptor");
    int (*set_dropout)(void *, void *, float, void *, size_t, unsigned long long) =
        dry_dnn_function("cudnnRestoreDropoutDescriptor");
    int (*set_rnn)(void *, int, int, int, int, int, int, int, int, int, int, int, int, void *, unsigned) =
        dry_dnn_function("cudnnSetRNNDescriptor_v8");
    int (*set_data)(void *, int, int, int, int, int, const int *, void *) =
        dry_dnn_function("cudnnSetRNNDataDescriptor");
    int (*get)(void *, void *, int, void *, size_t *, size_t *) = dry_dnn_function("cudnnGetRNNTempSpaceSizes");
    if (!make_rnn || !make_data || !make_dropout || !set_dropout || !set_rnn || !set_data || !get) return 0;
    void *rnn, *data, *dropout, *handle = calloc(1, HANDLE_BYTES);
    if (handle == NULL || make_rnn(&rnn) || make_data(&data) || make_dropout(&dropout)) return 0;
    if (d->dropout > 0 && set_dropout(dropout, handle, d->dropout, handle, STATE_BYTES, 0)) return 0;
    /* cuDNN refuses bf16 for an unknown device. fp16 stands for it, because its values are as wide. */
    int type = d->type == TYPE_BFLOAT16 ? TYPE_HALF : d->type, inner = x->type == TYPE_BFLOAT16 ? TYPE_HALF : x->type;
    int precision = d->precision == TYPE_BFLOAT16 ? TYPE_HALF : d->precision;
    double padding = 0;
    if (set_rnn(rnn, d->algorithm, d->cell, d->bias, d->direction, d->input_mode, type, precision, d->math, d->input,
                d->hidden, d->projection, d->layers, dropout, d->flags) ||
        set_data(data, inner, x->layout, x->longest, x->rows, x->width, x->lengths, &padding))
        return 0;
    *found = (sizes){UNTOUCHED, UNTOUCHED};
    get(handle, rnn, training, data, &found->workspace, &found->reserve); /* returns an error: there is no device */
    return found->workspace != UNTOUCHED && found->reserve != UNTOUCHED;
}

static void child(const dnn_rnn *d, const dnn_rnn_data *x, int training, int out) {
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM};
    struct rlimit none = {0, 0};
    sizes found;
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++) signal(fatal[i], SIG_DFL);
    setrlimit(RLIMIT_CORE, &none);
    int nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, STDOUT_FILENO);
    dup2(nowhere, STDERR_FILENO);
    alarm(SECONDS);
    if (ask(d, x, training, &found)) (void)!write(out, &found, sizeof found);
    _exit(0);
}

static int ask_forked(const dnn_rnn *d, const dnn_rnn_data *x, int training, sizes *found) {
    int ends[2];
    if (!dry_dnn_is_real() || pipe2(ends, O_CLOEXEC) != 0) return 0;
    pid_t process = fork();
    if (process == 0) child(d, x, training, ends[1]);
    close(ends[1]);
    ssize_t got = process > 0 ? read(ends[0], found, sizeof *found) : -1;
    close(ends[0]);
    if (process > 0) waitpid(process, NULL, 0);
    return got == (ssize_t)sizeof *found;
}

/* The formula of the workspace is within 15% of what cuDNN 9.19 answers for 108 layers: plain, LSTM and GRU, of three
 * sizes, in fp32 and fp16, in one and both directions, one to three layers, for training and not. */
static void estimate(const dnn_rnn *d, const dnn_rnn_data *x, int training, sizes *found) {
    static const size_t kept[] = {2, 2, 6, 7}; /* values that a cell keeps for its backward pass, by kind of cell */
    enum { LAYER_BYTES = 8 << 20 };            /* of each layer in each direction */
    size_t element = dry_rnn_element(d->type), cells = 0, weights = 0, directions = (size_t)dry_rnn_directions(d);
    for (int row = 0; row < x->rows; row++) cells += (size_t)x->lengths[row];
    cells *= (size_t)d->hidden * directions;
    cudnnGetRNNWeightSpaceSize(NULL, d, &weights);
    double each = (double)dry_rnn_gates(d) + (directions == 2 ? 3.3 : 1.5);
    if (training && d->cell <= CELL_TANH) each += directions == 2 ? 1.3 : 2.5;
    found->workspace = weights + (size_t)((double)(cells * element) * each);
    found->workspace += (size_t)d->layers * directions * LAYER_BYTES;
    found->reserve = training ? cells * (kept[d->cell] * (size_t)d->layers - 1) * element + 256 : 0;
    if (training && d->dropout > 0) found->reserve += cells * (size_t)(d->layers - 1) / 8;
}

static void find_out(const dnn_rnn *d, const dnn_rnn_data *x, int training, sizes *found) {
    if (ask_forked(d, x, training, found)) {
        dry_note("cuDNN recurrent layers: their workspace is what cuDNN answers without a card, which is not a "
                 "documented use of it");
        return;
    }
    /* For an unknown device cuDNN refuses the persistent algorithms, but not the standard one. */
    dnn_rnn standard = *d;
    standard.algorithm = 0;
    if (d->algorithm == 0 || !ask_forked(&standard, x, training, found)) estimate(d, x, training, found);
    dry_note_of("cuDNN recurrent layers: the workspace of some of them is estimated from their sizes",
                found->workspace);
}

/* ---- answers are kept, because a training run asks for the same sizes in each step ---- */
enum { KEPT = 64 };
static struct {
    uint64_t key;
    sizes found;
} kept[KEPT];

static uint64_t mix(uint64_t hash, const void *data, size_t bytes) {
    const unsigned char *at = data;
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ at[i]) * 1099511628211ull;
    return hash;
}

static uint64_t key_of(const dnn_rnn *d, const dnn_rnn_data *x, int training) {
    uint64_t hash = mix(1469598103934665603ull, d, sizeof *d);
    hash = mix(hash, x, offsetof(dnn_rnn_data, lengths));
    hash = mix(hash, x->lengths, (size_t)x->rows * sizeof *x->lengths);
    return mix(hash, &training, sizeof training) | 1;
}

int cudnnGetRNNTempSpaceSizes(dnn_handle h, const dnn_rnn *d, int training, const dnn_rnn_data *x, size_t *workspace,
                              size_t *reserve) {
    (void)h;
    uint64_t key = key_of(d, x, training);
    sizes found = {0, 0};
    int known = 0;
    dry_lock();
    if (kept[key % KEPT].key == key) found = kept[key % KEPT].found, known = 1;
    dry_unlock();
    if (!known) find_out(d, x, training, &found);
    dry_lock();
    kept[key % KEPT].key = key;
    kept[key % KEPT].found = found;
    dry_unlock();
    if (workspace) *workspace = found.workspace;
    if (reserve) *reserve = found.reserve;
    return DNN_OK;
}
