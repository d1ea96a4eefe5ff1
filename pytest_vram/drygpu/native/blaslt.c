/* Implements cuBLASLt. Descriptors store nothing, and the heuristic returns one algorithm that needs no workspace.
 * PyTorch allocates its workspace before it calls the heuristic, so the algorithm does not change the figures. */
#include <cuda_runtime_api.h>

#include "dry.h"

#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3 };

typedef struct {
    uint64_t data[8];
} algorithm;

typedef struct {
    algorithm algo;
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
} heuristic;

int cublasLtCreate(void **handle) {
    if (dry_ready() < 0) return NOT_INITIALIZED;
    *handle = malloc(1);
    return *handle ? OK : ALLOC_FAILED;
}

int cublasLtDestroy(void *handle) { return free(handle), OK; }
size_t cublasLtGetVersion(void) { return CUDART_VERSION / 10 * 100; }
size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }
const char *cublasLtGetStatusName(int status) {
    return status == OK ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_NOT_SUPPORTED";
}
const char *cublasLtGetStatusString(int status) {
    return status == OK ? "success" : "the requested functionality is not supported";
}

/* Callers never read a descriptor, so 64 zeroed bytes are enough, allocated here or in the caller's storage. The
 * descriptor of a matrix holds its size, from which the time of a product follows. */
typedef struct {
    uint64_t rows, columns, count; /* the count is 0 until it is set */
} layout;
enum { LAYOUT_BATCH_COUNT = 5 }; /* cublasLtMatrixLayoutAttribute_t */
static int make(void **descriptor) { return (*descriptor = calloc(1, 64)) ? OK : ALLOC_FAILED; }
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { return (void)compute, (void)scale, make(d); }
int cublasLtMatrixLayoutCreate(void **d, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    (void)type, (void)leading;
    int status = make(d);
    if (status == OK) *(layout *)*d = (layout){.rows = rows, .columns = columns};
    return status;
}
int cublasLtMatmulPreferenceCreate(void **d) { return make(d); }
int cublasLtMatrixTransformDescCreate(void **d, int scale) { return (void)scale, make(d); }
int cublasLtMatmulDescInit_internal(void *d, size_t size, int compute, int scale) {
    return (void)compute, (void)scale, memset(d, 0, size), OK;
}
int cublasLtMatmulPreferenceInit_internal(void *d, size_t size) { return memset(d, 0, size), OK; }
int cublasLtMatrixLayoutInit_internal(void *d, size_t size, int type, uint64_t rows, uint64_t columns,
                                      int64_t leading) {
    (void)type, (void)leading;
    memset(d, 0, size);
    if (size >= sizeof(layout)) *(layout *)d = (layout){.rows = rows, .columns = columns};
    return OK;
}
int cublasLtMatmulDescDestroy(void *d) { return free(d), OK; }
int cublasLtMatrixLayoutDestroy(void *d) { return free(d), OK; }
int cublasLtMatmulPreferenceDestroy(void *d) { return free(d), OK; }
int cublasLtMatrixTransformDescDestroy(void *d) { return free(d), OK; }

static int accept(const void *value) { return (void)value, OK; }
int cublasLtMatmulDescSetAttribute(void *d, int a, const void *v, size_t n) {
    return (void)d, (void)a, (void)n, accept(v);
}
int cublasLtMatrixLayoutSetAttribute(void *d, int a, const void *v, size_t n) {
    if (a == LAYOUT_BATCH_COUNT && v != NULL && n == sizeof(int32_t)) ((layout *)d)->count = *(const uint32_t *)v;
    return OK;
}
int cublasLtMatmulPreferenceSetAttribute(void *d, int a, const void *v, size_t n) {
    return (void)d, (void)a, (void)n, accept(v);
}
int cublasLtMatrixTransformDescSetAttribute(void *d, int a, const void *v, size_t n) {
    return (void)d, (void)a, (void)n, accept(v);
}
int cublasLtMatmulAlgoConfigSetAttribute(algorithm *algo, int a, const void *v, size_t n) {
    return (void)algo, (void)a, (void)n, accept(v);
}
int cublasLtMatmulAlgoConfigGetAttribute(const algorithm *algo, int attribute, void *value, size_t bytes,
                                         size_t *written) {
    (void)algo, (void)attribute;
    memset(value, 0, bytes);
    if (written) *written = bytes;
    return OK;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int asked, heuristic *results, int *returned) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *returned = asked > 0;
    if (asked > 0) {
        memset(results, 0, sizeof *results);
        results->waves = 1.0f;
    }
    return OK;
}

int cublasLtMatmulAlgoInit(void *handle, int compute, int scale, int ta, int tb, int tc, int td, int id,
                           algorithm *algo) {
    (void)handle, (void)compute, (void)scale, (void)ta, (void)tb, (void)tc, (void)td, (void)id;
    return memset(algo, 0, sizeof *algo), OK;
}

int cublasLtMatmulAlgoCheck(void *handle, void *operation, void *a, void *b, void *c, void *d, const algorithm *algo,
                            heuristic *result) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d;
    memset(result, 0, sizeof *result);
    result->algo = *algo;
    return OK;
}

int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *a, void *layout_a, const void *b,
                   void *layout_b, const void *beta, const void *c, void *layout_c, void *d, void *layout_d,
                   const algorithm *algo, void *workspace, size_t bytes, dry_stream stream) {
    (void)handle, (void)operation, (void)alpha, (void)a, (void)b, (void)layout_b, (void)beta, (void)c, (void)layout_c,
        (void)d, (void)algo, (void)workspace, (void)bytes;
    if (dry_load_products(dry_current_device()) != cudaSuccess) return ALLOC_FAILED;
    dry_count_kernel(stream);
    /* The result has m x n elements and the first matrix m x k, transposed or not. */
    const layout *left = layout_a, *result = layout_d;
    if (left != NULL && result != NULL && result->rows > 0)
        dry_clock_spend(stream, dry_time_of_product(2.0 * left->rows * left->columns * result->columns *
                                                    (result->count ? result->count : 1)));
    return OK;
}
int cublasLtMatrixTransform(void *handle, void *operation, const void *alpha, const void *a, void *layout_a,
                            const void *beta, const void *b, void *layout_b, void *c, void *layout_c,
                            dry_stream stream) {
    (void)handle, (void)operation, (void)alpha, (void)a, (void)layout_a, (void)beta, (void)b, (void)layout_b, (void)c,
        (void)layout_c;
    return dry_count_kernel(stream), OK;
}
