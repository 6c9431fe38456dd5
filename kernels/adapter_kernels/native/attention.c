// Attention over the paged cache: a sequence that decodes is one row, a chunk of a prompt is many.
//
// Keys and values are read where they lie, a block of positions at a time, and brought into the order in which pairs of
// bf16 are multiplied: once for all query heads of a KV head, and for several rows of a chunk. Online softmax over the
// blocks, so a long context needs no more room than a short one; scores and sums in fp32, weights in bf16. Blocks begin
// at multiples of their size and what a row does not see weighs exactly nothing, so a token's result has the same bits
// in whatever chunk it comes.
#include <math.h>

#include "tasks.h"
#include "vectors.h"

#define MAX_HEAD_DIM 256
#define BLOCK 64
#define MAX_QUERIES 64
// rows of a chunk that read a block together
#define TILE_ROWS 8
#define TILE 4
// tiles for each thread, below which they are cut by heads
#define FEW_TILES 4

// as `adapter_kernels.native_layouts.AttendCall` lays it out; all strides in values
typedef struct {
  // [tokens, num_heads, head_dim]
  const uint16_t *q;
  uint16_t *out;
  int64_t q_stride, out_stride;
  // [slots, num_kv_heads, head_dim]
  const uint16_t *k, *v;
  // [num_rows] row of q and out; slots of each row's positions, slots_stride apart, 0: all share them; [num_rows]
  const int64_t *rows, *slots, *context_lengths;
  int64_t num_rows, slots_stride, num_heads, num_kv_heads, head_dim;
  // positions a token sees; 0: all
  int64_t window;
  double scale;
} AttendCall;

typedef struct {
  const AttendCall *attend;
  // rows and KV heads of a task
  int64_t tile_rows, tile_heads;
  atomic_llong next;
} Call;

// the positions that one query sees, and where it is in the softmax
typedef struct {
  int64_t begin, end;
  float maximum, total;
} Sight;

// queries of one KV head; all rows are `width` values long, the head's own and zeros up to a multiple of LANES
typedef struct {
  int64_t width, count;
  Sight sights[MAX_QUERIES];
  uint16_t q[MAX_QUERIES * MAX_HEAD_DIM];
  float sums[MAX_QUERIES * MAX_HEAD_DIM];
} Queries;

// positions `start` to `start + BLOCK`, of which those from `begin` to `end` are there and the others zeros
typedef struct {
  int64_t start, begin, end;
  // [width / 2, BLOCK] pairs of neighbouring dims; [BLOCK / 2, width] pairs of neighbouring positions
  uint32_t keys[MAX_HEAD_DIM / 2 * BLOCK], values[BLOCK / 2 * MAX_HEAD_DIM];
} Block;

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ask for the head's rows at positions from `begin` to `end`, into the second cache: there is not enough to do until
// the first would have them, and it would wait
INLINE void fetch(const uint16_t *cache, int64_t stride, const int64_t *slots, int64_t begin, int64_t end,
                  int64_t head_dim) {
  for (int64_t i = begin; i < end; i++)
    for (int64_t e = 0; e < head_dim; e += LANES)
      _mm_prefetch((const char *)(cache + slots[i] * stride + e), _MM_HINT_T1);
}

// 32 dims of the head's row at `position`, zeros where the block has none
INLINE __m512i row_part(const uint16_t *cache, int64_t stride, const int64_t *slots, const Block *block,
                        int64_t position, __mmask32 mask) {
  if (position < block->begin || position >= block->end) return _mm512_setzero_si512();
  return loaded(cache + slots[position] * stride, mask);
}

static void take_keys(Block *block, const uint16_t *k, const uint16_t *v, int64_t stride, const int64_t *slots,
                      int64_t head_dim) {
  for (int64_t p = 0; p < BLOCK && block->start + p < block->end; p += 16) {
    const int64_t at = block->start + p;
    // the values of these positions are next
    fetch(v, stride, slots, larger(at, block->begin), smaller(at + 16, block->end), head_dim);
    for (int64_t e = 0; e < head_dim; e += LANES) {
      __m512i rows[16];
      for (int i = 0; i < 16; i++)
        rows[i] = row_part(k + e, stride, slots, block, at + i, first(head_dim - e));
      transpose(rows);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(block->keys + (e / 2 + i) * BLOCK + p, rows[i]);
    }
  }
}

// `last`: the position behind the last one of all blocks
static void take_values(Block *block, const uint16_t *k, const uint16_t *v, int64_t stride, const int64_t *slots,
                        int64_t head_dim, int64_t width, int64_t last) {
  for (int64_t p = 0; p < BLOCK && block->start + p < block->end; p += 2) {
    const int64_t at = block->start + p;
    // the keys of the next block are next
    fetch(k, stride, slots, at + BLOCK, smaller(at + BLOCK + 2, last), head_dim);
    for (int64_t e = 0; e < head_dim; e += LANES) {
      const __mmask32 mask = first(head_dim - e);
      const __m512i even = row_part(v + e, stride, slots, block, at, mask);
      const __m512i odd = row_part(v + e, stride, slots, block, at + 1, mask);
      uint32_t *pairs = block->values + p / 2 * width + e;
      _mm512_storeu_si512(pairs, paired_low(even, odd));
      _mm512_storeu_si512(pairs + 16, paired_high(even, odd));
    }
  }
}

// scores[i][p] of `num` <= TILE queries, a constant where it is called, for `count` positions rounded up to 32
INLINE void score(const Queries *queries, const int64_t *at, int num, const Block *block, int64_t count,
                  float scores[TILE][BLOCK]) {
  for (int64_t p = 0; p < count; p += 32) {
    __m512 dots[TILE][2];
    for (int i = 0; i < num; i++) dots[i][0] = dots[i][1] = _mm512_setzero_ps();
    for (int64_t e = 0; e < queries->width / 2; e++) {
      const __m512i left = _mm512_loadu_si512(block->keys + e * BLOCK + p);
      const __m512i right = _mm512_loadu_si512(block->keys + e * BLOCK + p + 16);
      for (int i = 0; i < num; i++) {
        const __m512i pair = repeated_pair(queries->q + at[i] * queries->width + 2 * e);
        dots[i][0] = pairs_added(dots[i][0], left, pair);
        dots[i][1] = pairs_added(dots[i][1], right, pair);
      }
    }
    for (int i = 0; i < num; i++) {
      _mm512_storeu_ps(scores[i] + p, dots[i][0]);
      _mm512_storeu_ps(scores[i] + p + 16, dots[i][1]);
    }
  }
}

// scores to weights [BLOCK], beside which the earlier sums are scaled down where the maximum grew
INLINE void weigh(Sight *sight, float *sums, int64_t width, const Block *block, const float *scores, float scale,
                  uint16_t *weights) {
  __m512 scaled[BLOCK / 16], largest = _mm512_set1_ps(sight->maximum);
  for (int g = 0; g < BLOCK / 16; g++) {
    const int64_t start = block->start + 16 * g;
    const __mmask16 mask = (__mmask16)(first(larger(0, sight->end - start)) & ~first(larger(0, sight->begin - start)));
    scaled[g] = _mm512_set1_ps(-INFINITY);
    if (mask) scaled[g] = _mm512_mask_mul_ps(scaled[g], mask, _mm512_loadu_ps(scores + 16 * g), _mm512_set1_ps(scale));
    largest = _mm512_max_ps(scaled[g], largest);
  }
  const float maximum = _mm512_reduce_max_ps(largest);
  __m512 total = _mm512_setzero_ps();
  for (int g = 0; g < BLOCK / 16; g += 2) {
    const __m512 low = exponential(_mm512_sub_ps(scaled[g], _mm512_set1_ps(maximum)));
    const __m512 high = exponential(_mm512_sub_ps(scaled[g + 1], _mm512_set1_ps(maximum)));
    const __m512i rounded = narrowed(low, high);
    _mm512_storeu_si512(weights + 16 * g, rounded);
    total = _mm512_add_ps(total, _mm512_add_ps(widened_low(rounded), widened_high(rounded)));
  }
  const __m512 fade = exponential(_mm512_set1_ps(sight->maximum - maximum));
  sight->total = sight->total * _mm512_cvtss_f32(fade) + _mm512_reduce_add_ps(total);
  if (sight->maximum != maximum)
    for (int64_t e = 0; e < width; e += 16)
      _mm512_storeu_ps(sums + e, _mm512_mul_ps(_mm512_loadu_ps(sums + e), fade));
  sight->maximum = maximum;
}

// sums of `num` <= TILE queries += weights[p] * v[p] over `count` positions
INLINE void gather(Queries *queries, const int64_t *at, int num, const Block *block, int64_t count,
                   uint16_t weights[TILE][BLOCK]) {
  const int64_t width = queries->width;
  for (int64_t e = 0; e < width; e += LANES) {
    __m512 low[TILE], high[TILE];
    for (int i = 0; i < num; i++) {
      low[i] = _mm512_loadu_ps(queries->sums + at[i] * width + e);
      high[i] = _mm512_loadu_ps(queries->sums + at[i] * width + e + 16);
    }
    for (int64_t p = 0; p < count; p += 2) {
      const __m512i left = _mm512_loadu_si512(block->values + p / 2 * width + e);
      const __m512i right = _mm512_loadu_si512(block->values + p / 2 * width + e + 16);
      for (int i = 0; i < num; i++) {
        const __m512i pair = repeated_pair(weights[i] + p);
        low[i] = pairs_added(low[i], left, pair);
        high[i] = pairs_added(high[i], right, pair);
      }
    }
    for (int i = 0; i < num; i++) {
      _mm512_storeu_ps(queries->sums + at[i] * width + e, low[i]);
      _mm512_storeu_ps(queries->sums + at[i] * width + e + 16, high[i]);
    }
  }
}

INLINE void attend_tile(Queries *queries, const int64_t *at, int num, const Block *block, float scale) {
  const int64_t count = smaller(BLOCK, block->end - block->start);
  float scores[TILE][BLOCK];
  uint16_t weights[TILE][BLOCK];
  score(queries, at, num, block, count, scores);
  for (int i = 0; i < num; i++)
    weigh(&queries->sights[at[i]], queries->sums + at[i] * queries->width, queries->width, block, scores[i], scale,
          weights[i]);
  gather(queries, at, num, block, count, weights);
}

static void attend_block(Queries *queries, const Block *block, float scale) {
  int64_t at[MAX_QUERIES], count = 0;
  for (int64_t i = 0; i < queries->count; i++)
    if (queries->sights[i].begin < block->start + BLOCK && queries->sights[i].end > block->start) at[count++] = i;
  for (int64_t i = 0; i < count; i += TILE) {
    switch (count - i) {
      case 1: attend_tile(queries, at + i, 1, block, scale); break;
      case 2: attend_tile(queries, at + i, 2, block, scale); break;
      case 3: attend_tile(queries, at + i, 3, block, scale); break;
      default: attend_tile(queries, at + i, TILE, block, scale);
    }
  }
}

// `num_heads` heads from `head` on of `num_rows` rows from the call's row `index` on
static void take_queries(Queries *queries, const AttendCall *call, int64_t index, int64_t num_rows, int64_t head,
                         int64_t num_heads) {
  queries->width = (call->head_dim + LANES - 1) / LANES * LANES;
  queries->count = num_rows * num_heads;
  for (int64_t i = 0; i < queries->count; i++) {
    const int64_t row = index + i / num_heads, end = call->context_lengths[row];
    const int64_t begin = call->window && call->window < end ? end - call->window : 0;
    queries->sights[i] = (Sight){.begin = begin, .end = end, .maximum = -INFINITY, .total = 0};
    const uint16_t *q = call->q + call->rows[row] * call->q_stride + (head + i % num_heads) * call->head_dim;
    for (int64_t e = 0; e < queries->width; e += LANES)
      _mm512_storeu_si512(queries->q + i * queries->width + e, loaded(q + e, first(call->head_dim - e)));
  }
  memset(queries->sums, 0, (size_t)(queries->count * queries->width) * sizeof *queries->sums);
}

static void put_results(const Queries *queries, const AttendCall *call, int64_t index, int64_t head,
                        int64_t num_heads) {
  for (int64_t i = 0; i < queries->count; i++) {
    uint16_t *out = call->out + call->rows[index + i / num_heads] * call->out_stride;
    out += (head + i % num_heads) * call->head_dim;
    const float *sums = queries->sums + i * queries->width;
    const __m512 total = _mm512_set1_ps(queries->sights[i].total);
    for (int64_t e = 0; e < call->head_dim; e += LANES) {
      const __m512 low = _mm512_div_ps(_mm512_loadu_ps(sums + e), total);
      const __m512 high = _mm512_div_ps(_mm512_loadu_ps(sums + e + 16), total);
      _mm512_mask_storeu_epi16(out + e, first(call->head_dim - e), narrowed(low, high));
    }
  }
}

static void attend(const AttendCall *call, int64_t index, int64_t num_rows, int64_t kv_head, int64_t head,
                   int64_t num_heads) {
  const int64_t head_dim = call->head_dim, stride = call->num_kv_heads * head_dim;
  const int64_t *slots = call->slots + index * call->slots_stride;
  const uint16_t *k = call->k + kv_head * head_dim, *v = call->v + kv_head * head_dim;
  Queries queries;
  Block block;
  take_queries(&queries, call, index, num_rows, head, num_heads);
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t i = 0; i < queries.count; i++) {
    begin = smaller(begin, queries.sights[i].begin);
    end = larger(end, queries.sights[i].end);
  }
  fetch(k, stride, slots, begin, smaller(begin + BLOCK, end), head_dim);
  for (block.start = begin / BLOCK * BLOCK; block.start < end; block.start += BLOCK) {
    block.begin = larger(begin, block.start);
    block.end = smaller(end, block.start + BLOCK);
    take_keys(&block, k, v, stride, slots, head_dim);
    take_values(&block, k, v, stride, slots, head_dim, queries.width, end);
    attend_block(&queries, &block, (float)call->scale);
  }
  put_results(&queries, call, index, head, num_heads);
}

static void attend_tasks(void *data) {
  Call *call = data;
  const AttendCall *all = call->attend;
  const int64_t group = all->num_heads / all->num_kv_heads, num_parts = all->num_kv_heads / call->tile_heads;
  for (int64_t task;;) {
    task = atomic_fetch_add(&call->next, 1);
    const int64_t index = task / num_parts * call->tile_rows, kv_begin = task % num_parts * call->tile_heads;
    if (index >= all->num_rows) return;
    const int64_t num_rows = smaller(call->tile_rows, all->num_rows - index);
    for (int64_t kv_head = kv_begin; kv_head < kv_begin + call->tile_heads; kv_head++)
      for (int64_t head = 0; head < group; head += MAX_QUERIES)
        attend(all, index, num_rows, kv_head, kv_head * group + head, smaller(group - head, MAX_QUERIES));
  }
}

void chorale_attend(const AttendCall *all, const Threads *threads) {
  const int64_t group = all->num_heads / all->num_kv_heads;
  Call call = {.attend = all};
  // rows of one sequence read the same positions
  call.tile_rows = all->slots_stride ? 1 : larger(1, smaller(TILE_ROWS, MAX_QUERIES / group));
  // a position's KV heads lie side by side: one thread reads them all, where there is work for every thread
  const int64_t num_tiles = (all->num_rows + call.tile_rows - 1) / call.tile_rows;
  call.tile_heads = num_tiles < FEW_TILES * threads->num_threads ? 1 : all->num_kv_heads;
  run_tasks(threads, attend_tasks, &call, &call.next);
}
