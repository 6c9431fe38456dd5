// The low-rank adapters of one fused site in one call: every run's rows meet their own adapter's A and B.
#include "low_rank.h"

#include "tasks.h"

#define TASK_ROWS 32
#define TASK_RANKS 16
// 4 KiB of a rank row and more: shorter pieces leave the processor no time to read ahead
#define TASK_COLUMNS 2432

typedef struct {
  Rows x, y, bridge;
  const Run *runs;
  int64_t num_runs;
  const Site *site;
  atomic_llong next;
} Call;

static void shrink_tasks(void *data) {
  Call *call = data;
  const Site *site = call->site;
  int64_t mine = atomic_fetch_add(&call->next, 1), index = 0;
  for (int64_t i = 0; i < call->num_runs; i++) {
    const Run run = call->runs[i];
    const uint16_t *a = site->a + run.position * site->num_ranks * site->in_dim;
    for (int64_t row = 0; row < run.count; row += TASK_ROWS) {
      for (int64_t rank = 0; rank < site->num_ranks; rank += TASK_RANKS) {
        if (index++ != mine) continue;
        shrink(rows_from(call->x, run.begin + row, 0), a + rank * site->in_dim, site->in_dim,
               smaller(TASK_ROWS, run.count - row), smaller(TASK_RANKS, site->num_ranks - rank),
               rows_from(call->bridge, run.begin + row, rank));
        mine = atomic_fetch_add(&call->next, 1);
      }
    }
  }
}

static void expand_tasks(void *data) {
  Call *call = data;
  int64_t mine = atomic_fetch_add(&call->next, 1), index = 0;
  for (int64_t i = 0; i < call->num_runs; i++) {
    const Run run = call->runs[i];
    for (int64_t m = 0; m < call->site->num_members; m++) {
      const Member *member = &call->site->members[m];
      const uint16_t *bt = member->bt + run.position * member->rank * member->width;
      for (int64_t row = 0; row < run.count; row += TASK_ROWS) {
        for (int64_t column = 0; column < member->width; column += TASK_COLUMNS) {
          if (index++ != mine) continue;
          expand(rows_from(call->bridge, run.begin + row, member->rank_begin), bt + column, member->rank,
                 member->width, smaller(TASK_ROWS, run.count - row), smaller(TASK_COLUMNS, member->width - column),
                 rows_from(call->y, run.begin + row, member->out_begin + column));
          mine = atomic_fetch_add(&call->next, 1);
        }
      }
    }
  }
}

// which layouts and calls this library has; `adapter_kernels.native_layouts` knows one
int chorale_abi(void) { return CHORALE_ABI; }

// 1: the processor has what all of this needs
int chorale_is_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// y += (x A^T) B^T for each run. bridge [rows of x, num_ranks]: room for x A^T.
void chorale_add_low_rank(const uint16_t *x, int64_t x_stride, uint16_t *y, int64_t y_stride, uint16_t *bridge,
                          const Run *runs, int64_t num_runs, const Site *site, const Threads *threads) {
  Call call = {
      .x = {(uint16_t *)x, x_stride},
      .y = {y, y_stride},
      .bridge = {bridge, site->num_ranks},
      .runs = runs,
      .num_runs = num_runs,
      .site = site,
  };
  run_tasks(threads, shrink_tasks, &call, &call.next);
  run_tasks(threads, expand_tasks, &call, &call.next);
}
