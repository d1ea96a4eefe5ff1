/* The descriptors of recurrent layers, shared by dnnrnn.c and dnntemp.c. */
#ifndef PYTEST_VRAM_DRY_DNNRNN_H
#define PYTEST_VRAM_DRY_DNNRNN_H

#include "dnn.h"

#define DNN_MOST_DIMENSIONS 8
enum { CELL_RELU, CELL_TANH, CELL_LSTM, CELL_GRU };                                /* cudnnRNNMode_t */
enum { TYPE_FLOAT = 0, TYPE_DOUBLE = 1, TYPE_HALF = 2, TYPE_BFLOAT16 = 9 };         /* cudnnDataType_t */

typedef struct {
    int type, rank, sizes[DNN_MOST_DIMENSIONS], strides[DNN_MOST_DIMENSIONS];
} dnn_tensor;

typedef struct {
    float probability;
} dnn_dropout;

typedef struct {
    int algorithm, cell, bias, direction, input_mode, type, precision, math, input, hidden, projection, layers;
    unsigned flags;
    float dropout;
} dnn_rnn;

typedef struct {
    int type, layout, longest, rows, width;
    int *lengths; /* one for each row */
} dnn_rnn_data;

int cudnnGetRNNWeightSpaceSize(dnn_handle h, const dnn_rnn *d, size_t *bytes);
size_t dry_rnn_element(int type); /* bytes */
int dry_rnn_gates(const dnn_rnn *d);
int dry_rnn_directions(const dnn_rnn *d);

#endif
