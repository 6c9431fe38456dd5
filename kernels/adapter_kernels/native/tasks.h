// How a call spreads its work over torch's threads.
//
// Work is cut into small tasks, in one order, which the threads take one after another from a counter. Each value of a
// result is made by one task, in an order of sums that its own row alone decides, so neither the number of threads nor
// the rows beside it show in its bits.
#ifndef CHORALE_TASKS_H
#define CHORALE_TASKS_H

#include <stdatomic.h>
#include <stdint.h>

// to be raised with every change of a layout or a call
#define CHORALE_ABI 3

// libgomp's entry point: torch's own pool, which spins between torch's operators and ours alike
typedef void (*Parallel)(void (*work)(void *), void *data, unsigned num_threads, unsigned flags);

// as `adapter_kernels.native_layouts.Threads` lays it out; parallel NULL: the caller's thread alone
typedef struct {
  Parallel parallel;
  int64_t num_threads;
} Threads;

static inline void run_tasks(const Threads *threads, void (*work)(void *), void *call, atomic_llong *next) {
  atomic_store(next, 0);
  if (threads->parallel && threads->num_threads > 1) {
    threads->parallel(work, call, (unsigned)threads->num_threads, 0);
  } else {
    work(call);
  }
}

// of calls that touch each value once: below so many a second thread costs more than it saves
#define MIN_THREADED 16384

static inline void run_light_tasks(const Threads *threads, int64_t num_values, void (*work)(void *), void *call,
                                   atomic_llong *next) {
  const Threads alone = {0, 1};
  run_tasks(num_values < MIN_THREADED ? &alone : threads, work, call, next);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
