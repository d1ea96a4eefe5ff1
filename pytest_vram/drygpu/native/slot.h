/* Functions whose arguments are integers and pointers, for libraries with many functions of which few arguments matter.
 * Each argument takes one slot. An int fills half of its slot. */
#ifndef PYTEST_VRAM_SLOT_H
#define PYTEST_VRAM_SLOT_H

#include <stdarg.h>

typedef long slot;
enum { MOST = 24 };

/* A function that looks at its arguments a[1] (the handle) to a[last] only. */
#define FUNCTION(name, last, result)                                                                                   \
    int name(slot handle, ...) {                                                                                       \
        slot a[MOST] = {0, handle};                                                                                    \
        va_list rest;                                                                                                  \
        va_start(rest, handle);                                                                                        \
        for (int i = 2; i <= (last); i++) a[i] = va_arg(rest, slot);                                                   \
        va_end(rest);                                                                                                  \
        return result;                                                                                                 \
    }
#define INT(i) ((slot)(int)a[i])

#endif
