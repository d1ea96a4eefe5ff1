/* One lock protects all state. It is held only briefly, and never while code of the program runs. */
#include "dry.h"

#include <pthread.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void dry_lock(void) { pthread_mutex_lock(&mutex); }
void dry_unlock(void) { pthread_mutex_unlock(&mutex); }

static void unlock_in_child(void) { pthread_mutex_init(&mutex, NULL); }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(dry_lock, dry_unlock, unlock_in_child); }
