/* Implements cuBLAS. Handles keep their settings, and matrix products return without computing. PyTorch allocates the
 * workspace itself, as a tensor, so nothing is allocated here. Functions whose result may go to the host write zero. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3 };
enum { POINTER_HOST = 0 };

typedef struct {
    cudaStream_t stream; /* first: solver.c reads it */
    int pointer_mode, math_mode, sm_target, atomics_mode;
} *handle;

int cublasCreate_v2(handle *made) {
    if (dry_ready() < 0) return NOT_INITIALIZED;
    *made = calloc(1, sizeof **made);
    return *made ? OK : ALLOC_FAILED;
}

int cublasDestroy_v2(handle h) { return free(h), OK; }
int cublasGetVersion_v2(handle h, int *version) { return (void)h, *version = CUDART_VERSION / 10 * 100, OK; }
int cublasSetStream_v2(handle h, cudaStream_t stream) { return h->stream = stream, OK; }
int cublasGetStream_v2(handle h, cudaStream_t *stream) { return *stream = h->stream, OK; }
int cublasSetPointerMode_v2(handle h, int mode) { return h->pointer_mode = mode, OK; }
int cublasGetPointerMode_v2(handle h, int *mode) { return *mode = h->pointer_mode, OK; }
int cublasSetMathMode(handle h, int mode) { return h->math_mode = mode, OK; }
int cublasGetMathMode(handle h, int *mode) { return *mode = h->math_mode, OK; }
int cublasSetAtomicsMode(handle h, int mode) { return h->atomics_mode = mode, OK; }
int cublasGetAtomicsMode(handle h, int *mode) { return *mode = h->atomics_mode, OK; }
int cublasSetSmCountTarget(handle h, int target) { return h->sm_target = target, OK; }
int cublasGetSmCountTarget(handle h, int *target) { return *target = h->sm_target, OK; }
int cublasSetWorkspace_v2(handle h, void *workspace, size_t bytes) { return (void)h, (void)workspace, (void)bytes, OK; }
const char *cublasGetStatusName(int status) {
    return status == OK ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_NOT_SUPPORTED";
}
const char *cublasGetStatusString(int status) {
    return status == OK ? "success" : "the requested functionality is not supported";
}

/* ---- results that may go to the host ---- */
static int scalar(handle h, void *result, size_t bytes) {
    dry_count_kernel(h->stream);
    if (h->pointer_mode == POINTER_HOST) {
        memset(result, 0, bytes);
        dry_count_copy(DRY_TO_HOST, bytes, h->stream);
        dry_count_blocking_copy(h->stream);
    }
    return OK;
}
int cublasDotEx(handle h, int n, const void *x, int type_x, int step_x, const void *y, int type_y, int step_y,
                void *result, int result_type, int execution_type) {
    (void)n, (void)x, (void)type_x, (void)step_x, (void)y, (void)type_y, (void)step_y, (void)execution_type;
    /* cudaDataType: R_32F, R_64F, R_16F, R_8I, C_32F, C_64F, C_16F; what follows is R_16BF and smaller */
    static const unsigned char widths[] = {4, 8, 2, 1, 8, 16, 4};
    return scalar(h, result, result_type >= 0 && result_type < (int)sizeof widths ? widths[result_type] : 2);
}

#define REDUCE(name, bytes)                                                                                            \
    int name(handle h, int n, const void *x, int step, void *result) {                                                 \
        return (void)n, (void)x, (void)step, scalar(h, result, bytes);                                                 \
    }
#define DOT(name, bytes)                                                                                               \
    int name(handle h, int n, const void *x, int step_x, const void *y, int step_y, void *result) {                    \
        return (void)n, (void)x, (void)step_x, (void)y, (void)step_y, scalar(h, result, bytes);                        \
    }
// clang-format off
REDUCE(cublasSnrm2_v2, 4) REDUCE(cublasDnrm2_v2, 8) REDUCE(cublasScnrm2_v2, 4) REDUCE(cublasDznrm2_v2, 8)
REDUCE(cublasSasum_v2, 4) REDUCE(cublasDasum_v2, 8) REDUCE(cublasScasum_v2, 4) REDUCE(cublasDzasum_v2, 8)
REDUCE(cublasIsamax_v2, 4) REDUCE(cublasIdamax_v2, 4) REDUCE(cublasIcamax_v2, 4) REDUCE(cublasIzamax_v2, 4)
REDUCE(cublasIsamin_v2, 4) REDUCE(cublasIdamin_v2, 4) REDUCE(cublasIcamin_v2, 4) REDUCE(cublasIzamin_v2, 4)
DOT(cublasSdot_v2, 4) DOT(cublasDdot_v2, 8)
DOT(cublasCdotu_v2, 8) DOT(cublasCdotc_v2, 8) DOT(cublasZdotu_v2, 16) DOT(cublasZdotc_v2, 16)
// clang-format on

/* ---- copies of matrices by columns, and of vectors, as MAGMA makes them ---- */
static int copied(int error) { return error == cudaSuccess ? OK : NOT_INITIALIZED; }
#define COPY(direction, kind)                                                                                          \
    int cublas##direction##MatrixAsync(int rows, int columns, int width, const void *from, int from_rows, void *to,    \
                                       int to_rows, cudaStream_t stream) {                                             \
        return copied(cudaMemcpy2DAsync(to, (size_t)to_rows * width, from, (size_t)from_rows * width,                  \
                                        (size_t)rows * width, columns, kind, stream));                                 \
    }                                                                                                                  \
    int cublas##direction##Matrix(int rows, int columns, int width, const void *from, int from_rows, void *to,         \
                                  int to_rows) {                                                                       \
        return copied(cudaMemcpy2D(to, (size_t)to_rows * width, from, (size_t)from_rows * width, (size_t)rows * width, \
                                   columns, kind));                                                                    \
    }                                                                                                                  \
    int cublas##direction##VectorAsync(int count, int width, const void *from, int from_step, void *to, int to_step,   \
                                       cudaStream_t stream) {                                                          \
        return copied(cudaMemcpy2DAsync(to, (size_t)to_step * width, from, (size_t)from_step * width, width, count,    \
                                        kind, stream));                                                                \
    }                                                                                                                  \
    int cublas##direction##Vector(int count, int width, const void *from, int from_step, void *to, int to_step) {      \
        return copied(                                                                                                 \
            cudaMemcpy2D(to, (size_t)to_step * width, from, (size_t)from_step * width, width, count, kind));           \
    }
COPY(Set, cudaMemcpyHostToDevice)
COPY(Get, cudaMemcpyDeviceToHost)

/* ---- products, solves and updates: their results stay on the device ---- */
static int product(handle h) {
    if (dry_load_products(dry_current_device()) != cudaSuccess) return ALLOC_FAILED;
    return dry_count_kernel(h->stream), OK;
}

/* The sizes follow the two transpositions. */
static int multiply(handle h, int m, int n, int k, int count) {
    int status = product(h);
    if (status == OK) dry_clock_spend(h->stream, dry_time_of_product(2.0 * m * n * k * count));
    return status;
}
#define ONE(name)                                                                                                      \
    int name(handle h, int ta, int tb, int m, int n, int k) { return (void)ta, (void)tb, multiply(h, m, n, k, 1); }
#define STRIDED(name)                                                                                                  \
    int name(handle h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int rows_a,              \
             long long step_a, const void *b, int rows_b, long long step_b, const void *beta, void *c, int rows_c,     \
             long long step_c, int count) {                                                                            \
        (void)ta, (void)tb, (void)alpha, (void)a, (void)rows_a, (void)step_a, (void)b, (void)rows_b, (void)step_b;     \
        (void)beta, (void)c, (void)rows_c, (void)step_c;                                                               \
        return multiply(h, m, n, k, count);                                                                            \
    }
int cublasGemmStridedBatchedEx(handle h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                               int type_a, int rows_a, long long step_a, const void *b, int type_b, int rows_b,
                               long long step_b, const void *beta, void *c, int type_c, int rows_c, long long step_c,
                               int count) {
    (void)ta, (void)tb, (void)alpha, (void)a, (void)type_a, (void)rows_a, (void)step_a, (void)b, (void)type_b;
    (void)rows_b, (void)step_b, (void)beta, (void)c, (void)type_c, (void)rows_c, (void)step_c;
    return multiply(h, m, n, k, count);
}

// clang-format off
#define KERNEL(name) int name(handle h) { return product(h); }
ONE(cublasSgemm_v2) ONE(cublasDgemm_v2) ONE(cublasCgemm_v2) ONE(cublasZgemm_v2)
ONE(cublasHgemm) ONE(cublasSgemmEx) ONE(cublasGemmEx)
STRIDED(cublasSgemmStridedBatched) STRIDED(cublasDgemmStridedBatched) STRIDED(cublasCgemmStridedBatched)
STRIDED(cublasZgemmStridedBatched) STRIDED(cublasHgemmStridedBatched)
#define SDCZ(name) KERNEL(cublasS##name) KERNEL(cublasD##name) KERNEL(cublasC##name) KERNEL(cublasZ##name)
SDCZ(axpy_v2) SDCZ(copy_v2) SDCZ(swap_v2) SDCZ(scal_v2) SDCZ(rot_v2) SDCZ(gemv_v2) SDCZ(trmv_v2) SDCZ(trsv_v2)
SDCZ(symv_v2) SDCZ(syr_v2) SDCZ(syr2_v2)
SDCZ(symm_v2) SDCZ(syrk_v2) SDCZ(syr2k_v2) SDCZ(trmm_v2) SDCZ(trsm_v2)
SDCZ(gemmBatched) SDCZ(trsmBatched)
KERNEL(cublasSger_v2) KERNEL(cublasDger_v2)
KERNEL(cublasCgeru_v2) KERNEL(cublasZgeru_v2) KERNEL(cublasCgerc_v2) KERNEL(cublasZgerc_v2)
KERNEL(cublasChemm_v2) KERNEL(cublasZhemm_v2) KERNEL(cublasChemv_v2) KERNEL(cublasZhemv_v2)
KERNEL(cublasCherk_v2) KERNEL(cublasZherk_v2) KERNEL(cublasCher_v2) KERNEL(cublasZher_v2)
KERNEL(cublasCher2_v2) KERNEL(cublasZher2_v2) KERNEL(cublasCher2k_v2) KERNEL(cublasZher2k_v2)
KERNEL(cublasCsscal_v2) KERNEL(cublasZdscal_v2) KERNEL(cublasCsrot_v2) KERNEL(cublasZdrot_v2)
KERNEL(cublasHgemmBatched)
KERNEL(cublasGemmBatchedEx)
    // clang-format on
