/* Prevents an abort at the end of a process, and records the exit code, or the signal that ended a child.
 *
 * Python before 3.14 ends a thread that asks for the interpreter lock while the interpreter shuts down, by
 * pthread_exit. In PyTorch's autograd threads this unwinds noexcept frames, so the C++ runtime calls std::terminate,
 * and a script that did all its work aborts. On a real GPU, backward() returns so late that this does not happen. On a
 * dry GPU, the threads may still be freeing the graph when the script ends.
 *
 * The remedy is that of Python 3.14: such a thread sleeps until the process ends.
 */
#include "dry.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef void (*handler)(void);

static handler previous;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static int python_is_finalizing(void) {
    int (*ask)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsFinalizing"); /* 3.13 on */
    if (ask == NULL) ask = (int (*)(void))dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");
    int (*initialized)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    return (ask != NULL && ask()) || (initialized != NULL && !initialized());
}

static void sleep_if_finalizing(void) {
    if (getpid() != gettid() && python_is_finalizing())
        for (;;) pause();
    if (previous != NULL) previous();
}

static void install(void) {
    /* The mangled name is used because the stub is written in C and must not load a C++ runtime. The symbol is taken
     * from the library itself, which need not be in the global scope. */
    void *runtime = dlopen("libstdc++.so.6", RTLD_NOLOAD | RTLD_LAZY);
    handler (*set_terminate)(handler) =
        (handler (*)(handler))(runtime ? dlsym(runtime, "_ZSt13set_terminatePFvvE") : NULL);
    if (set_terminate != NULL) previous = set_terminate(sleep_if_finalizing);
}

void dry_watch_exit(void) { pthread_once(&once, install); }

/* ---- the exit code, for drygpu/process/record.py: functions of Python's atexit do not get it ---- */
static char exit_path[4096];
static pid_t exit_owner;

static void write_exit(int status, void *unused) {
    (void)unused;
    if (getpid() != exit_owner) return; /* a forked child, whose record is its own */
    FILE *file = fopen(exit_path, "w");
    if (file == NULL) return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    fprintf(file, "%d %lld\n", status, (long long)now.tv_sec * 1000000000 + now.tv_nsec);
    fclose(file);
}

/* Writes the exit code and the monotonic clock's nanoseconds to a file when this process ends by exit(). */
int pytest_vram_dry_write_exit(const char *path) {
    if (strlen(path) >= sizeof exit_path) return 0;
    strcpy(exit_path, path);
    exit_owner = getpid();
    return on_exit(write_exit, NULL) == 0;
}

/* ---- the signal that ended a child: the child cannot write it, so the process that waits for it does, such as torchrun
 * for its ranks. A shell may call waitpid in a signal handler, so nothing here allocates. ---- */
static void write_signal(pid_t child, int number) {
    const char *folder = getenv("PYTEST_VRAM_RECORD");
    char path[4096], line[64];
    struct timespec now;
    if (folder == NULL || *folder == 0) return;
    if (snprintf(path, sizeof path, "%s/%d.signal", folder, (int)child) >= (int)sizeof path) return;
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0) return;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int size = snprintf(line, sizeof line, "%d %lld\n", number, (long long)now.tv_sec * 1000000000 + now.tv_nsec);
    if (write(file, line, (size_t)size) != size) unlink(path);
    close(file);
}

pid_t waitpid(pid_t which, int *status, int options) {
    int own = 0;
    pid_t child = wait4(which, &own, options, NULL);
    if (child > 0 && WIFSIGNALED(own)) write_signal(child, WTERMSIG(own));
    if (status != NULL && child > 0) *status = own;
    return child;
}
