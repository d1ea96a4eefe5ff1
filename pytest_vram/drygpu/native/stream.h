/* The structs of a stream, an event and a graph. Several files share them, because the handles of the runtime and of the
 * driver are the same. */
#ifndef PYTEST_VRAM_DRY_STREAM_H
#define PYTEST_VRAM_DRY_STREAM_H

#include "dry.h"

#include <stddef.h>
#include <stdint.h>

/* A capture is small and never freed, because streams and events point to it. */
struct dry_capture {
    int active;
    uint64_t id;
    struct CUstream_st *origin;
    struct CUgraph_st *graph;
};

struct CUstream_st {
    int device;
    unsigned flags;
    int priority;
    uint64_t id;
    double end; /* see clock.c */
    struct dry_capture *capture;
};

struct CUevent_st {
    int device, recorded;
    unsigned flags;
    double time; /* when it is complete: see clock.c */
    uint64_t launches, plans; /* kernels and cuDNN plans before it, from which its time is made up */
    struct dry_capture *capture;
};

struct dry_retained {
    struct dry_retained *next;
    struct CUuserObject_st *object;
    unsigned count;
};

struct CUgraph_st {
    size_t nodes;
    dry_work work;
    struct dry_retained *retained;
};

/* ---- capture.c ---- */
int dry_is_default(struct CUstream_st *stream);
struct dry_capture *dry_capture_of(struct CUstream_st *stream);
void dry_join_capture(struct CUstream_st *stream, struct dry_capture *capture);

#endif
