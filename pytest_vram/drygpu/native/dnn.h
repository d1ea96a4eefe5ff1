/* What the files of cuDNN share: its status codes, its handle, and the installed cuDNN, where it can be asked. */
#ifndef PYTEST_VRAM_DRY_DNN_H
#define PYTEST_VRAM_DRY_DNN_H

#include "dry.h"

enum { DNN_OK = 0, DNN_NOT_INITIALIZED = 1001, DNN_ALLOCATION_FAILED = 1003, DNN_BAD_PARAM = 2000, DNN_NOT_SUPPORTED = 3000 };

typedef struct {
    dry_stream stream;
} *dnn_handle;

/* ---- dnnreal.c ---- */
int dry_dnn_is_real(void);                   /* whether the installed cuDNN answers here; the first call loads it */
void *dry_dnn_function(const char *name);    /* a function of the installed cuDNN, or NULL */
const void *dry_dnn_device_properties(void); /* the card, as a finalized descriptor of the installed cuDNN */

/* ---- dnnconv.c ---- */
int dry_dnn_takes(void *plan);            /* whether a card would take this plan, which has just been made */
uint64_t dry_dnn_unsaid(const void *plan); /* the part of a plan's workspace that the plan does not name */
void dry_dnn_drop(const void *plan);      /* the plan is about to be destroyed */
void dry_dnn_executed(const void *plan);  /* tells it, if it is one of a convolution */
void dry_dnn_timed(void);                 /* the plan that was run last was run to time it */

/* ---- dnngraph.c ---- */
uint64_t dry_dnn_executions(void); /* how many execution plans were run so far */

#endif
