/* Implements cuSOLVER's dense solvers, so that PyTorch's own code for decompositions runs: it allocates the copies, pivots
 * and error codes that it allocates on a card, and asks here how much workspace a solver needs. Nothing is solved; each
 * error code is set to 0, "no error".
 *
 * The library itself tells sizes only where there is a card, so they are computed:
 *   eigenvalues  4 n^2 + 256 n elements: measured for n = 2048, fp32, on an H200 (tests/truth, linalg_mix)
 *   Jacobi SVD   m n + n^2 + 70 n: within 0.2% of what the library (12.0) said of six sizes, asked without a device
 *   the others   a block of columns, as in LAPACK; not measured
 */
#include <cuda_runtime_api.h>

#include "dry.h"
#include "slot.h"

#include <stdlib.h>
#include <string.h>

enum { OK = 0, ALLOC_FAILED = 2, BLOCK = 64 };

static int make(void **made) { return (*made = calloc(1, 64)) ? OK : ALLOC_FAILED; }

/* Counts a kernel on the stream of a handle, which is its first field, in cuBLAS's handle as well. Writes `count` error
 * codes of 0: to the device, or to the host for cuBLAS's batched functions. */
static int done(slot handle, slot info, slot count) {
    memset((void *)info, 0, (size_t)count * sizeof(int));
    if (dry_load_products(dry_current_device()) != cudaSuccess) return ALLOC_FAILED;
    return dry_count_kernel(*(cudaStream_t *)handle), OK;
}

static slot smaller(slot a, slot b) { return a < b ? a : b; }
static slot larger(slot a, slot b) { return a < b ? b : a; }
static slot of_eigenvalues(slot n) { return 4 * n * n + 256 * n; }
static slot of_jacobi(slot m, slot n) { return larger(m, n) * smaller(m, n) + smaller(m, n) * (smaller(m, n) + 70); }
static slot of_blocks(slot n) { return BLOCK * n; }

static void note(slot bytes) {
    dry_note_of("cuSOLVER: workspaces are worked out from few measured sizes, not told by the library", bytes);
}

static int tell(slot where, slot elements, slot width) {
    note(elements * width);
    *(int *)where = elements < 0x7fffffff ? (int)elements : 0x7fffffff;
    return OK;
}

/* cudaDataType: R_32F, R_64F, C_32F, C_64F */
static int tell_bytes(slot device, slot host, slot elements, slot type) {
    slot width = type == 5 ? 16 : type == 1 || type == 4 ? 8 : 4;
    note(elements * width);
    *(size_t *)device = (size_t)(elements * width);
    *(size_t *)host = 0;
    return OK;
}

int cusolverDnCreate(void **made) { return make(made); }
int cusolverDnCreateParams(void **made) { return make(made); }
int cusolverDnCreateGesvdjInfo(void **made) { return make(made); }
int cusolverDnCreateSyevjInfo(void **made) { return make(made); }
int cusolverDnDestroy(void *made) { return free(made), OK; }
int cusolverDnDestroyParams(void *made) { return free(made), OK; }
int cusolverDnDestroyGesvdjInfo(void *made) { return free(made), OK; }
int cusolverDnDestroySyevjInfo(void *made) { return free(made), OK; }
int cusolverDnSetStream(cudaStream_t *handle, cudaStream_t stream) { return *handle = stream, OK; }
int cusolverDnXgesvdjSetTolerance(void) { return OK; }
int cusolverDnXgesvdjSetMaxSweeps(void) { return OK; }
int cusolverDnXgesvdjSetSortEig(void) { return OK; }
int cusolverDnXsyevjSetSortEig(void) { return OK; }

/* A function of each type. */
#define NAMED(real, complex, last, result)                                                                             \
    FUNCTION(cusolverDnS##real, last, result)                                                                          \
    FUNCTION(cusolverDnD##real, last, result)                                                                          \
    FUNCTION(cusolverDnC##complex, last, result) FUNCTION(cusolverDnZ##complex, last, result)
#define SIZES(real, complex, last, where, elements)                                                                    \
    FUNCTION(cusolverDnS##real, last, tell(a[where], elements, 4))                                                     \
    FUNCTION(cusolverDnD##real, last, tell(a[where], elements, 8))                                                     \
    FUNCTION(cusolverDnC##complex, last, tell(a[where], elements, 8))                                                  \
    FUNCTION(cusolverDnZ##complex, last, tell(a[where], elements, 16))
#define SIZE(real, complex, where, elements) SIZES(real, complex, where, where, elements)
#define SOLVE(real, complex, info) NAMED(real, complex, info, done(handle, a[info], 1))
/* Solvers of a batch, which torch also uses for one small matrix. */
#define SIZE_BATCH(real, complex, where, batch, elements) SIZES(real, complex, batch, where, INT(batch) * (elements))
#define SOLVE_BATCH(real, complex, info, batch) NAMED(real, complex, batch, done(handle, a[info], INT(batch)))
#define BLAS_BATCH(name, info, batch, count)                                                                           \
    FUNCTION(cublasS##name, batch, done(handle, a[info], count))                                                               \
    FUNCTION(cublasD##name, batch, done(handle, a[info], count))                                                               \
    FUNCTION(cublasC##name, batch, done(handle, a[info], count)) FUNCTION(cublasZ##name, batch, done(handle, a[info], count))
/* The newer form is one function for all types. Its sizes are bytes, on the device and on the host. */
#define SIZE_X(name, device, type, elements)                                                                           \
    FUNCTION(cusolverDn##name, (device) + 1, tell_bytes(a[device], a[(device) + 1], elements, INT(type)))
#define SOLVE_X(name, info) FUNCTION(cusolverDn##name, info, done(handle, a[info], 1))

SIZE(potrf_bufferSize, potrf_bufferSize, 6, of_blocks(INT(3)))
SIZE(getrf_bufferSize, getrf_bufferSize, 6, of_blocks(INT(3)))
SIZE(geqrf_bufferSize, geqrf_bufferSize, 6, of_blocks(INT(3)))
SIZE(orgqr_bufferSize, ungqr_bufferSize, 8, of_blocks(INT(3)))
SIZE(ormqr_bufferSize, unmqr_bufferSize, 12, of_blocks(larger(INT(4), INT(5))))
SIZE(gesvd_bufferSize, gesvd_bufferSize, 4, 2 * INT(2) * INT(3))
SIZE(gesvdj_bufferSize, gesvdj_bufferSize, 13, of_jacobi(INT(4), INT(5)))
SIZE(syevd_bufferSize, heevd_bufferSize, 8, of_eigenvalues(INT(4)))
SIZE(syevj_bufferSize, heevj_bufferSize, 8, of_eigenvalues(INT(4)))
SIZE_X(Xpotrf_bufferSize, 9, 5, of_blocks(a[4]))
SIZE_X(Xgeqrf_bufferSize, 11, 5, of_blocks(a[4]))
SIZE_X(Xsyevd_bufferSize, 12, 6, of_eigenvalues(a[5]))

SOLVE(potrf, potrf, 8)
SOLVE(potrs, potrs, 9)
SOLVE(getrf, getrf, 8)
SOLVE(getrs, getrs, 10)
SOLVE(geqrf, geqrf, 9)
SOLVE(orgqr, ungqr, 10)
SOLVE(ormqr, unmqr, 14)
SOLVE(gesvd, gesvd, 16)
SOLVE(gesvdj, gesvdj, 15)
SOLVE(syevd, heevd, 10)
SOLVE(syevj, heevj, 10)
SOLVE_X(Xpotrf, 13)
SOLVE_X(Xpotrs, 12)
SOLVE_X(Xgeqrf, 15)
SOLVE_X(Xsyevd, 16)

SIZE_BATCH(gesvdjBatched_bufferSize, gesvdjBatched_bufferSize, 12, 14, of_jacobi(INT(3), INT(4)))
SIZE_BATCH(gesvdaStridedBatched_bufferSize, gesvdaStridedBatched_bufferSize, 17, 18, of_jacobi(INT(4), INT(5)))
SIZE_BATCH(syevjBatched_bufferSize, heevjBatched_bufferSize, 8, 10, of_eigenvalues(INT(4)))
FUNCTION(cusolverDnXsyevBatched_bufferSize, 14, tell_bytes(a[12], a[13], a[14] * of_eigenvalues(a[5]), INT(6)))
SOLVE_BATCH(gesvdjBatched, gesvdjBatched, 14, 16)
SOLVE_BATCH(gesvdaStridedBatched, gesvdaStridedBatched, 19, 21)
SOLVE_BATCH(syevjBatched, heevjBatched, 10, 12)
SOLVE_BATCH(potrfBatched, potrfBatched, 6, 7)
SOLVE(potrsBatched, potrsBatched, 9)
FUNCTION(cusolverDnXsyevBatched, 17, done(handle, a[16], a[17]))
BLAS_BATCH(getrfBatched, 6, 7, INT(7))
BLAS_BATCH(getrsBatched, 10, 11, 1)
BLAS_BATCH(geqrfBatched, 7, 8, 1)
