/* cuDNN's recurrent layers: nn.RNN, nn.GRU and nn.LSTM.
 *
 * Descriptors are our own structs and keep what they are given. The weights are laid out as in cuDNN's guide: the
 * matrices of all layers, then all biases. dnntemp.c finds out how much workspace and reserve a layer needs.
 */
#include "dnnrnn.h"

#include <stdlib.h>
#include <string.h>

enum { NO_BIAS = 0, DOUBLE_BIAS = 2 };

static int make(void **made, size_t bytes) { return (*made = calloc(1, bytes)) ? DNN_OK : DNN_ALLOCATION_FAILED; }

/* ---- tensors: cuDNN returns the sizes of a layer's weights in them ---- */
int cudnnCreateTensorDescriptor(dnn_tensor **made) { return make((void **)made, sizeof **made); }
int cudnnDestroyTensorDescriptor(dnn_tensor *d) { return free(d), DNN_OK; }
int cudnnSetTensorNdDescriptor(dnn_tensor *d, int type, int rank, const int *sizes, const int *strides) {
    if (d == NULL || rank < 1 || rank > DNN_MOST_DIMENSIONS) return DNN_BAD_PARAM;
    d->type = type;
    d->rank = rank;
    for (int i = 0; i < rank; i++) d->sizes[i] = sizes[i], d->strides[i] = strides ? strides[i] : 0;
    return DNN_OK;
}
int cudnnGetTensorNdDescriptor(const dnn_tensor *d, int room, int *type, int *rank, int *sizes, int *strides) {
    *type = d->type;
    *rank = d->rank;
    for (int i = 0; i < d->rank && i < room; i++) sizes[i] = d->sizes[i], strides[i] = d->strides[i];
    return DNN_OK;
}

/* ---- dropout between layers ---- */
int cudnnCreateDropoutDescriptor(dnn_dropout **made) { return make((void **)made, sizeof **made); }
int cudnnDestroyDropoutDescriptor(dnn_dropout *d) { return free(d), DNN_OK; }
int cudnnSetDropoutDescriptor(dnn_dropout *d, dnn_handle h, float probability, void *states, size_t bytes,
                              unsigned long long seed) {
    (void)h, (void)states, (void)bytes, (void)seed;
    return d->probability = probability, DNN_OK;
}
int cudnnRestoreDropoutDescriptor(dnn_dropout *d, dnn_handle h, float probability, void *states, size_t bytes,
                                  unsigned long long seed) {
    return cudnnSetDropoutDescriptor(d, h, probability, states, bytes, seed);
}
int cudnnDropoutGetStatesSize(dnn_handle h, size_t *bytes) {
    (void)h;
    *bytes = (size_t)dry_the_card()->multiprocessors * 1024 * 48;
    dry_note_of("cuDNN dropout: its random state is taken to be 48 bytes for each of 1,024 threads of a multiprocessor",
                *bytes);
    return DNN_OK;
}

/* ---- the layer ---- */
int cudnnCreateRNNDescriptor(dnn_rnn **made) { return make((void **)made, sizeof **made); }
int cudnnDestroyRNNDescriptor(dnn_rnn *d) { return free(d), DNN_OK; }
int cudnnSetRNNDescriptor_v8(dnn_rnn *d, int algorithm, int cell, int bias, int direction, int input_mode, int type,
                             int precision, int math, int input, int hidden, int projection, int layers,
                             const dnn_dropout *dropout, unsigned flags) {
    if (d == NULL || cell < 0 || cell > CELL_GRU || input < 1 || hidden < 1 || layers < 1) return DNN_BAD_PARAM;
    *d = (dnn_rnn){algorithm, cell,   bias,       direction, input_mode, type,
                   precision, math,   input,      hidden,    projection, layers,
                   flags,     dropout ? dropout->probability : 0};
    return DNN_OK;
}
int cudnnBuildRNNDynamic(dnn_handle h, dnn_rnn *d, int rows) { return (void)h, (void)d, (void)rows, DNN_OK; }

int cudnnCreateRNNDataDescriptor(dnn_rnn_data **made) { return make((void **)made, sizeof **made); }
int cudnnDestroyRNNDataDescriptor(dnn_rnn_data *d) {
    if (d != NULL) free(d->lengths);
    return free(d), DNN_OK;
}
int cudnnSetRNNDataDescriptor(dnn_rnn_data *d, int type, int layout, int longest, int rows, int width,
                              const int *lengths, void *padding) {
    (void)padding;
    if (d == NULL || longest < 1 || rows < 1) return DNN_BAD_PARAM;
    int *copy = malloc((size_t)rows * sizeof *copy);
    if (copy == NULL) return DNN_ALLOCATION_FAILED;
    memcpy(copy, lengths, (size_t)rows * sizeof *copy);
    free(d->lengths);
    *d = (dnn_rnn_data){type, layout, longest, rows, width, copy};
    return DNN_OK;
}

/* ---- its weights: a pseudo-layer is a layer in one direction ---- */
static const int gates[] = {1, 1, 4, 3};

size_t dry_rnn_element(int type) { return type == TYPE_DOUBLE ? 8 : type == TYPE_HALF || type == TYPE_BFLOAT16 ? 2 : 4; }
int dry_rnn_gates(const dnn_rnn *d) { return gates[d->cell]; }
int dry_rnn_directions(const dnn_rnn *d) { return d->direction ? 2 : 1; }
static int projects(const dnn_rnn *d) { return d->projection > 0 && d->projection != d->hidden; }
static size_t width_out(const dnn_rnn *d) { return (size_t)(projects(d) ? d->projection : d->hidden); }
static size_t width_in(const dnn_rnn *d, int pseudo) {
    int layer = pseudo / dry_rnn_directions(d);
    return layer == 0 ? (size_t)d->input : width_out(d) * (size_t)dry_rnn_directions(d);
}

/* Rows and columns of matrix number `linear`: gates of the input, gates of the state, and the projection. */
static void matrix(const dnn_rnn *d, int pseudo, int linear, size_t *rows, size_t *columns) {
    int g = dry_rnn_gates(d);
    *rows = linear < 2 * g ? (size_t)d->hidden : width_out(d);
    *columns = linear < g ? width_in(d, pseudo) : linear < 2 * g ? width_out(d) : (size_t)d->hidden;
}

static int has_bias(const dnn_rnn *d, int linear) {
    int g = dry_rnn_gates(d);
    if (d->bias == NO_BIAS || linear >= 2 * g) return 0;
    return d->bias == DOUBLE_BIAS || (d->bias == 1) == (linear < g);
}

/* Number of elements before matrix, or bias, number `linear` of a pseudo-layer; past the last one, that of all. */
static size_t before(const dnn_rnn *d, int pseudo, int linear, int bias) {
    int all = d->layers * dry_rnn_directions(d), each = 2 * dry_rnn_gates(d) + projects(d);
    size_t sum = 0, rows, columns;
    for (int kind = 0; kind < 2; kind++)
        for (int p = 0; p < all; p++)
            for (int l = 0; l < each; l++) {
                if (kind == bias && p == pseudo && l == linear) return sum;
                matrix(d, p, l, &rows, &columns);
                sum += kind == 0 ? rows * columns : has_bias(d, l) ? rows : 0;
            }
    return sum;
}

int cudnnGetRNNWeightSpaceSize(dnn_handle h, const dnn_rnn *d, size_t *bytes) {
    (void)h;
    return *bytes = before(d, -1, -1, 1) * dry_rnn_element(d->type), DNN_OK;
}

int cudnnGetRNNWeightParams(dnn_handle h, const dnn_rnn *d, int pseudo, size_t bytes, const void *space, int linear,
                            dnn_tensor *matrix_of, void **matrix_at, dnn_tensor *bias_of, void **bias_at) {
    /* The caller passes NULL for what it does not ask for. */
    (void)h, (void)bytes;
    int g = dry_rnn_gates(d);
    size_t element = dry_rnn_element(d->type), rows, columns;
    if (pseudo < 0 || pseudo >= d->layers * dry_rnn_directions(d) || linear < 0 || linear >= 2 * g + projects(d))
        return DNN_BAD_PARAM;
    matrix(d, pseudo, linear, &rows, &columns);
    if (matrix_of != NULL)
        cudnnSetTensorNdDescriptor(matrix_of, d->type, 3, (int[]){1, (int)rows, (int)columns},
                                   (int[]){(int)(rows * columns), (int)columns, 1});
    if (matrix_at != NULL) *matrix_at = (char *)space + before(d, pseudo, linear, 0) * element;
    if (bias_of != NULL)
        cudnnSetTensorNdDescriptor(bias_of, d->type, 3, (int[]){1, (int)rows, 1}, (int[]){(int)rows, 1, 1});
    if (bias_at != NULL)
        *bias_at = has_bias(d, linear) ? (char *)space + before(d, pseudo, linear, 1) * element : NULL;
    return DNN_OK;
}

/* ---- nothing is computed ---- */
static int run(dnn_handle h) {
    dry_count_kernel(h ? h->stream : NULL);
    dry_is_capturing(h ? h->stream : NULL);
    return DNN_OK;
}
int cudnnRNNForward(dnn_handle h) { return run(h); }
int cudnnRNNBackwardData_v8(dnn_handle h) { return run(h); }
int cudnnRNNBackwardWeights_v8(dnn_handle h) { return run(h); }
