// Attention over the paged cache, each row by itself: a sequence that decodes is one row, a chunk of a prompt is many.
//
// Keys and values are read where they lie. Online softmax over blocks of positions, so a long context needs no more room
// than a short one; scores, weights and sums in fp32. A task is one row's one KV head, so a token's result is the same
// in whatever chunk it comes.
#include <math.h>

#include "tasks.h"
#include "vectors.h"

#define TILE_HEADS 4
#define BLOCK 64
#define MAX_HEAD_DIM 256
#define QUAD 4
#define AHEAD 12

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
  atomic_llong next;
} Call;

// up to TILE_HEADS query heads of one KV head, and where they are in the softmax
typedef struct {
  const uint16_t *q;
  float maximum[TILE_HEADS], total[TILE_HEADS];
  float sums[TILE_HEADS][MAX_HEAD_DIM];
} Heads;

// ask for one head's row of the cache
INLINE void fetch(const uint16_t *row, int64_t head_dim) {
  for (int64_t e = 0; e < head_dim; e += LANES) _mm_prefetch((const char *)(row + e), _MM_HINT_T0);
}

// scores[h][p] of `count` positions; lanes up to the next quad hold minus infinity
INLINE void score(const Heads *heads, int num_heads, const uint16_t *k, const uint16_t *v, int64_t stride,
                  const int64_t *slots, int64_t count, int64_t last, int64_t head_dim, float scale,
                  float scores[TILE_HEADS][BLOCK]) {
  for (int64_t p = 0; p < count; p += QUAD) {
    const uint16_t *keys[QUAD];
    for (int i = 0; i < QUAD; i++) {
      keys[i] = k + slots[smaller(p + i, count - 1)] * stride;
      // the values of these positions are next, then the keys further on
      fetch(v + slots[smaller(p + i, count - 1)] * stride, head_dim);
      fetch(k + slots[smaller(p + i + AHEAD, last)] * stride, head_dim);
    }
    __m512 sums[TILE_HEADS][QUAD];
    for (int h = 0; h < num_heads; h++)
      for (int i = 0; i < QUAD; i++) sums[h][i] = _mm512_setzero_ps();
    for (int64_t e = 0; e < head_dim; e += LANES) {
      const __mmask32 mask = first(head_dim - e);
      __m512i right[QUAD];
      for (int i = 0; i < QUAD; i++) right[i] = loaded(keys[i] + e, mask);
      for (int h = 0; h < num_heads; h++) {
        const __m512i left = loaded(heads->q + h * head_dim + e, mask);
        for (int i = 0; i < QUAD; i++) sums[h][i] = pairs_added(sums[h][i], left, right[i]);
      }
    }
    const __mmask8 real = (__mmask8)((1u << smaller(QUAD, count - p)) - 1);
    for (int h = 0; h < num_heads; h++) {
      const __m128 dots = _mm_mul_ps(folded(sums[h][0], sums[h][1], sums[h][2], sums[h][3]), _mm_set1_ps(scale));
      _mm_storeu_ps(scores[h] + p, _mm_mask_blend_ps(real, _mm_set1_ps(-INFINITY), dots));
    }
  }
}

// scores to weights, beside which the earlier sums are scaled down where the maximum grew
INLINE void weigh(Heads *heads, int num_heads, int64_t count, int64_t head_dim, float scores[TILE_HEADS][BLOCK]) {
  const int64_t padded = (count + QUAD - 1) / QUAD * QUAD;
  for (int h = 0; h < num_heads; h++) {
    __m512 largest = _mm512_set1_ps(heads->maximum[h]);
    for (int64_t p = 0; p < padded; p += 16) {
      const __mmask16 mask = (__mmask16)first(smaller(16, padded - p));
      largest = _mm512_max_ps(_mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), mask, scores[h] + p), largest);
    }
    const float maximum = _mm512_reduce_max_ps(largest);
    __m512 total = _mm512_setzero_ps();
    for (int64_t p = 0; p < padded; p += 16) {
      const __mmask16 mask = (__mmask16)first(smaller(16, padded - p));
      const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores[h] + p), _mm512_set1_ps(maximum));
      const __m512 weights = _mm512_maskz_mov_ps(mask, exponential(below));
      _mm512_mask_storeu_ps(scores[h] + p, mask, weights);
      total = _mm512_add_ps(total, weights);
    }
    const __m512 fade = exponential(_mm512_set1_ps(heads->maximum[h] - maximum));
    heads->total[h] = heads->total[h] * _mm512_cvtss_f32(fade) + _mm512_reduce_add_ps(total);
    if (heads->maximum[h] != maximum)
      for (int64_t e = 0; e < head_dim; e += 16)
        _mm512_storeu_ps(heads->sums[h] + e, _mm512_mul_ps(_mm512_loadu_ps(heads->sums[h] + e), fade));
    heads->maximum[h] = maximum;
  }
}

// sums[h] += weights[h][p] * v[p]
INLINE void gather(Heads *heads, int num_heads, const uint16_t *v, int64_t v_stride, const int64_t *slots,
                   int64_t count, int64_t head_dim, float weights[TILE_HEADS][BLOCK]) {
  for (int64_t e = 0; e < head_dim; e += LANES) {
    const __mmask32 mask = first(head_dim - e);
    __m512 low[TILE_HEADS], high[TILE_HEADS];
    for (int h = 0; h < num_heads; h++) {
      low[h] = _mm512_loadu_ps(heads->sums[h] + e);
      high[h] = _mm512_loadu_ps(heads->sums[h] + e + 16);
    }
    for (int64_t p = 0; p < count; p++) {
      const __m512i values = loaded(v + slots[p] * v_stride + e, mask);
      const __m512 left = widened_low(values), right = widened_high(values);
      for (int h = 0; h < num_heads; h++) {
        const __m512 weight = _mm512_set1_ps(weights[h][p]);
        low[h] = _mm512_fmadd_ps(weight, left, low[h]);
        high[h] = _mm512_fmadd_ps(weight, right, high[h]);
      }
    }
    for (int h = 0; h < num_heads; h++) {
      _mm512_storeu_ps(heads->sums[h] + e, low[h]);
      _mm512_storeu_ps(heads->sums[h] + e + 16, high[h]);
    }
  }
}

// `num_heads` <= TILE_HEADS heads of the call's row `index` from `head` on, a constant where it is called
INLINE void attend(const AttendCall *call, int64_t index, int64_t kv_head, int64_t head, int num_heads) {
  const int64_t head_dim = call->head_dim, stride = call->num_kv_heads * head_dim, row = call->rows[index];
  const int64_t end = call->context_lengths[index], begin = call->window && call->window < end ? end - call->window : 0;
  const int64_t *slots = call->slots + index * call->slots_stride;
  const uint16_t *k = call->k + kv_head * head_dim, *v = call->v + kv_head * head_dim;
  Heads heads = {.q = call->q + row * call->q_stride + head * head_dim};
  for (int h = 0; h < num_heads; h++) heads.maximum[h] = -INFINITY;
  float scores[TILE_HEADS][BLOCK];
  for (int64_t p = begin; p < end; p += BLOCK) {
    const int64_t count = smaller(BLOCK, end - p);
    score(&heads, num_heads, k, v, stride, slots + p, count, end - p - 1, head_dim, (float)call->scale, scores);
    weigh(&heads, num_heads, count, head_dim, scores);
    gather(&heads, num_heads, v, stride, slots + p, count, head_dim, scores);
  }
  for (int h = 0; h < num_heads; h++) {
    uint16_t *out = call->out + row * call->out_stride + (head + h) * head_dim;
    const __m512 total = _mm512_set1_ps(heads.total[h]);
    for (int64_t e = 0; e < head_dim; e += LANES) {
      const __m512 low = _mm512_div_ps(_mm512_loadu_ps(heads.sums[h] + e), total);
      const __m512 high = _mm512_div_ps(_mm512_loadu_ps(heads.sums[h] + e + 16), total);
      _mm512_mask_storeu_epi16(out + e, first(head_dim - e), narrowed(low, high));
    }
  }
}

static void attend_tasks(void *data) {
  Call *call = data;
  const AttendCall *all = call->attend;
  const int64_t group = all->num_heads / all->num_kv_heads, num_tasks = all->num_rows * all->num_kv_heads;
  for (int64_t task; (task = atomic_fetch_add(&call->next, 1)) < num_tasks;) {
    const int64_t index = task / all->num_kv_heads, kv_head = task % all->num_kv_heads;
    for (int64_t begin = 0; begin < group; begin += TILE_HEADS) {
      const int64_t head = kv_head * group + begin;
      switch (group - begin) {
        case 1: attend(all, index, kv_head, head, 1); break;
        case 2: attend(all, index, kv_head, head, 2); break;
        case 3: attend(all, index, kv_head, head, 3); break;
        default: attend(all, index, kv_head, head, TILE_HEADS);
      }
    }
  }
}

void chorale_attend(const AttendCall *all, const Threads *threads) {
  Call call = {.attend = all};
  run_tasks(threads, attend_tasks, &call, &call.next);
}
