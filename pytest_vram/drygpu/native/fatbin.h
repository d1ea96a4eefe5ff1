/* A fat binary contains the kernels of one library, compiled for several architectures. */
#ifndef PYTEST_VRAM_DRY_FATBIN_H
#define PYTEST_VRAM_DRY_FATBIN_H

#include <stdint.h>

typedef struct {
    void *wrapper; /* as passed to __cudaRegisterFatBinary */
    int read;
    uint64_t loaded; /* a bit for each device on which it is loaded */
    int binary, ptx; /* what the card would run: 86 for sm_86; 0 when there is no image for it */
} dry_fatbin;

int dry_fatbin_binary(dry_fatbin *image);

#endif
