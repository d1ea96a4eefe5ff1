/* One lock for all state. Calls are short and never call back into the program while they hold it. */
#include "dry.h"

#include <pthread.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void dry_lock(void) { pthread_mutex_lock(&mutex); }
void dry_unlock(void) { pthread_mutex_unlock(&mutex); }

static void unlock_in_child(void) { pthread_mutex_init(&mutex, NULL); }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(dry_lock, dry_unlock, unlock_in_child); }
