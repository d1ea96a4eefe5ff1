/* Implements cuSPARSE and cuSPARSELt, so that PyTorch's own code for sparse matrices runs. Nothing is computed.
 *
 * The libraries tell the size of a workspace only where there is a card, so it counts as 0 bytes, and the program is told.
 * How many elements a sum or product of two sparse matrices has depends on their values. Each pair of elements is
 * assumed to make an element of its own, up to all elements of the result, so that the figure is an upper bound. The
 * program is told that too.
 */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "slot.h"

#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 2 };

typedef struct {
    int64_t rows, columns, count; /* of the elements that are stored */
} matrix;

static int make(void **made) { return (*made = calloc(1, 64)) ? OK : ALLOC_FAILED; }
static int kernel(slot handle) { return dry_count_kernel(*(cudaStream_t *)handle), OK; }

static int no_bytes(slot where, size_t width) {
    dry_note("cuSPARSE: its workspaces are not known and counted as 0 bytes");
    memset((void *)where, 0, width);
    return OK;
}

static int64_t at_most_all(int64_t count, int64_t rows, int64_t columns) {
    dry_note("cuSPARSE results: a sum or product of sparse matrices is taken to have as many elements as it can have");
    return columns > 0 && count / columns >= rows ? rows * columns : count;
}

/* ---- handles and descriptors ---- */
int cusparseCreate(void **made) { return dry_ready() < 0 ? NOT_INITIALIZED : make(made); }
int cusparseDestroy(void *made) { return free(made), OK; }
int cusparseSetStream(cudaStream_t *handle, cudaStream_t stream) { return *handle = stream, OK; }
int cusparseSetPointerMode(void) { return OK; }
const char *cusparseGetErrorString(int status) { return status == OK ? "success" : "operation not supported"; }

#define DESCRIPTOR(name)                                                                                               \
    int cusparseCreate##name(void **made) { return make(made); }                                                       \
    int cusparseDestroy##name(void *made) { return free(made), OK; }
DESCRIPTOR(MatDescr)
DESCRIPTOR(DnMat)
DESCRIPTOR(DnVec)
DESCRIPTOR(Bsrsv2Info)
DESCRIPTOR(Bsrsm2Info)
#define WORK_DESCRIPTOR(name)                                                                                          \
    int cusparse##name##_createDescr(void **made) { return make(made); }                                               \
    int cusparse##name##_destroyDescr(void *made) { return free(made), OK; }
WORK_DESCRIPTOR(SpGEMM)
WORK_DESCRIPTOR(SpSV)
WORK_DESCRIPTOR(SpSM)
int cusparseSetMatDiagType(void) { return OK; }
int cusparseSetMatFillMode(void) { return OK; }
int cusparseSetMatIndexBase(void) { return OK; }
int cusparseSetMatType(void) { return OK; }
int cusparseDnMatSetStridedBatch(void) { return OK; }

static int make_matrix(matrix **made, int64_t rows, int64_t columns, int64_t count) {
    if (make((void **)made) != OK) return ALLOC_FAILED;
    **made = (matrix){rows, columns, count};
    return OK;
}
int cusparseCreateCsr(matrix **made, int64_t rows, int64_t columns, int64_t count) {
    return make_matrix(made, rows, columns, count);
}
int cusparseCreateCoo(matrix **made, int64_t rows, int64_t columns, int64_t count) {
    return make_matrix(made, rows, columns, count);
}
int cusparseDestroySpMat(void *made) { return free(made), OK; }
int cusparseCsrSetPointers(void) { return OK; }
int cusparseCsrSetStridedBatch(void) { return OK; }
int cusparseSpMatSetAttribute(void) { return OK; }
int cusparseSpMatGetSize(const matrix *m, int64_t *rows, int64_t *columns, int64_t *count) {
    return *rows = m->rows, *columns = m->columns, *count = m->count, OK;
}

/* ---- the generic interface: sizes of workspaces, and kernels ---- */
#define SIZE(name, where) FUNCTION(cusparse##name##_bufferSize, where, no_bytes(a[where], sizeof(size_t)))
#define KERNEL(name) FUNCTION(cusparse##name, 1, kernel(handle))
SIZE(SpMM, 11)
SIZE(SpMV, 10)
SIZE(SDDMM, 11)
SIZE(SpSV, 10)
SIZE(SpSM, 11)
KERNEL(SpMM)
KERNEL(SpMV)
KERNEL(SDDMM)
KERNEL(SDDMM_preprocess)
KERNEL(SpSV_analysis)
KERNEL(SpSV_solve)
KERNEL(SpSM_analysis)
KERNEL(SpSM_solve)

/* The product of two sparse matrices asks for the workspace of each step before it takes it, and then how long the result
 * is. torch transposes none of its matrices here. */
static int multiply(slot handle, const matrix *left, const matrix *right, matrix *result, slot where, slot buffer) {
    int64_t each = right->rows > 0 ? (right->count + right->rows - 1) / right->rows : 0; /* elements of a row */
    result->count = at_most_all(left->count * each, result->rows, result->columns);
    return buffer == 0 ? no_bytes(where, sizeof(size_t)) : kernel(handle);
}
#define STEP(name)                                                                                                     \
    FUNCTION(cusparseSpGEMM_##name, 13, multiply(handle, (matrix *)a[5], (matrix *)a[6], (matrix *)a[8], a[12], a[13]))
STEP(workEstimation)
STEP(compute)
KERNEL(SpGEMM_copy)

/* ---- the older interface: blocks, sums and sorting ---- */
static int count_sum(slot handle, int64_t sum, int64_t rows, int64_t columns, slot where) {
    *(int *)where = (int)at_most_all(sum, rows, columns);
    return kernel(handle);
}
FUNCTION(cusparseXcsrgeam2Nnz, 15, count_sum(handle, INT(5) + INT(9), INT(2), INT(3), a[14]))
static int no_pivot_is_zero(slot position) { return *(int *)position = -1, OK; }
FUNCTION(cusparseXbsrsv2_zeroPivot, 3, no_pivot_is_zero(a[3]))
FUNCTION(cusparseXbsrsm2_zeroPivot, 3, no_pivot_is_zero(a[3]))
FUNCTION(cusparseXcoosort_bufferSizeExt, 7, no_bytes(a[7], sizeof(size_t)))
FUNCTION(cusparseXcsrsort_bufferSizeExt, 7, no_bytes(a[7], sizeof(size_t)))
KERNEL(Xcoo2csr)
KERNEL(XcoosortByRow)
KERNEL(Xcsrsort)
KERNEL(CreateIdentityPermutation)

#define EACH_TYPE(of)                                                                                                  \
    of(S)                                                                                                              \
    of(D)                                                                                                              \
    of(C)                                                                                                              \
    of(Z)
#define OLDER(type)                                                                                                    \
    FUNCTION(cusparse##type##csrgeam2_bufferSizeExt, 20, no_bytes(a[20], sizeof(size_t)))                              \
    FUNCTION(cusparse##type##bsrsv2_bufferSize, 12, no_bytes(a[12], sizeof(int)))                                      \
    FUNCTION(cusparse##type##bsrsm2_bufferSize, 14, no_bytes(a[14], sizeof(int)))                                      \
    KERNEL(type##csrgeam2)                                                                                             \
    KERNEL(type##bsrmm)                                                                                                \
    KERNEL(type##bsrmv)                                                                                                \
    KERNEL(type##bsrsv2_analysis)                                                                                      \
    KERNEL(type##bsrsv2_solve)                                                                                         \
    KERNEL(type##bsrsm2_analysis)                                                                                      \
    KERNEL(type##bsrsm2_solve)
EACH_TYPE(OLDER)

/* ---- cuSPARSELt: matrices of which two in four elements are stored. Descriptors are the caller's. ---- */
int cusparseLtInit(void) { return dry_ready() < 0 ? NOT_INITIALIZED : OK; }
int cusparseLtDenseDescriptorInit(void) { return OK; }
int cusparseLtStructuredDescriptorInit(void) { return OK; }
int cusparseLtMatDescriptorDestroy(void) { return OK; }
int cusparseLtMatmulDescriptorInit(void) { return OK; }
int cusparseLtMatmulDescSetAttribute(void) { return OK; }
int cusparseLtMatmulAlgSelectionInit(void) { return OK; }
int cusparseLtMatmulAlgSetAttribute(void) { return OK; }
int cusparseLtMatmulPlanInit(void) { return OK; }
int cusparseLtMatmulPlanDestroy(void) { return OK; }
int cusparseLtMatmulAlgGetAttribute(const void *handle, const void *selection, int attribute, void *data, size_t bytes) {
    enum { MAX_ID = 1, SPLIT_K = 3 };
    (void)handle, (void)selection;
    memset(data, 0, bytes);
    if (attribute == MAX_ID || attribute == SPLIT_K) memcpy(data, &(int){1}, bytes < sizeof(int) ? bytes : sizeof(int));
    return OK;
}
int cusparseLtMatmulGetWorkspace(const void *handle, const void *plan, size_t *bytes) {
    return (void)handle, (void)plan, no_bytes((slot)bytes, sizeof *bytes);
}
/* PyTorch knows the size of a compressed matrix itself, and asks only for the workspace. */
int cusparseLtSpMMACompressedSize2(const void *handle, const void *dense, size_t *bytes, size_t *workspace) {
    (void)handle, (void)dense;
    *bytes = 0;
    return no_bytes((slot)workspace, sizeof *workspace);
}
int cusparseLtSpMMACompress2(const void *handle, const void *dense, int is_left, int operation, const void *from, void *to,
                             void *workspace, cudaStream_t stream) {
    (void)handle, (void)dense, (void)is_left, (void)operation, (void)from, (void)to, (void)workspace;
    return dry_count_kernel(stream), OK;
}
static int multiply_structured(const cudaStream_t *streams, int count) {
    return dry_count_kernel(count > 0 && streams ? streams[0] : NULL), OK;
}
FUNCTION(cusparseLtMatmul, 11, multiply_structured((cudaStream_t *)a[10], (int)a[11]))
FUNCTION(cusparseLtMatmulSearch, 11, multiply_structured((cudaStream_t *)a[10], (int)a[11]))
