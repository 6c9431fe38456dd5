// What is done to each row on its own between the products: the gated activation and the norm.
#include <math.h>

#include "tasks.h"
#include "vectors.h"

#define TASK_ROWS 4

typedef struct {
  const uint16_t *x, *weight;
  uint16_t *out;
  int64_t x_stride, num_rows, width;
  float eps;
  void (*row)(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t width, float eps);
  atomic_llong next;
} Call;

INLINE __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
  const __m512 shrunk = exponential(_mm512_sub_ps(_mm512_setzero_ps(), size));
  // x / (1 + e^-x), for negative x with numerator and denominator times e^x
  const __mmask16 is_negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mask_mul_ps(x, is_negative, x, shrunk), _mm512_add_ps(one, shrunk));
}

// out = round(silu(gate)) * up, rounded; x is gate | up
static void silu_mul_row(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t width, float eps) {
  (void)weight, (void)eps;
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask32 mask = first(width - c);
    const __m512i gate = loaded(x + c, mask), up = loaded(x + width + c, mask);
    const __m512i activated = narrowed(silu(widened_low(gate)), silu(widened_high(gate)));
    const __m512 low = _mm512_mul_ps(widened_low(activated), widened_low(up));
    const __m512 high = _mm512_mul_ps(widened_high(activated), widened_high(up));
    _mm512_mask_storeu_epi16(out + c, mask, narrowed(low, high));
  }
}

// out = round(x / rms(x)) * weight, rounded
static void rms_norm_row(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t width, float eps) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t c = 0; c < width; c += LANES) {
    const __m512i values = loaded(x + c, first(width - c));
    const __m512 low = widened_low(values), high = widened_high(values);
    sums[0] = _mm512_fmadd_ps(low, low, sums[0]);
    sums[1] = _mm512_fmadd_ps(high, high, sums[1]);
  }
  const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) / (float)width;
  const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask32 mask = first(width - c);
    const __m512i values = loaded(x + c, mask), scale = loaded(weight + c, mask);
    const __m512i normed =
        narrowed(_mm512_mul_ps(widened_low(values), factor), _mm512_mul_ps(widened_high(values), factor));
    const __m512 low = _mm512_mul_ps(widened_low(normed), widened_low(scale));
    const __m512 high = _mm512_mul_ps(widened_high(normed), widened_high(scale));
    _mm512_mask_storeu_epi16(out + c, mask, narrowed(low, high));
  }
}

static void row_tasks(void *data) {
  Call *call = data;
  for (int64_t begin; (begin = atomic_fetch_add(&call->next, TASK_ROWS)) < call->num_rows;) {
    const int64_t end = smaller(begin + TASK_ROWS, call->num_rows);
    for (int64_t i = begin; i < end; i++)
      call->row(call->x + i * call->x_stride, call->weight, call->out + i * call->width, call->width, call->eps);
  }
}

static void run_rows(Call *call, const Threads *threads) {
  run_light_tasks(threads, call->num_rows * call->width, row_tasks, call, &call->next);
}

// x [num_rows, 2 * width], rows x_stride apart; out [num_rows, width] contiguous
void chorale_silu_mul(const uint16_t *x, int64_t x_stride, uint16_t *out, int64_t num_rows, int64_t width,
                      const Threads *threads) {
  Call call = {.x = x, .out = out, .x_stride = x_stride, .num_rows = num_rows, .width = width, .row = silu_mul_row};
  run_rows(&call, threads);
}

// x [num_rows, width], rows x_stride apart; out alike, contiguous; weight [width]
void chorale_rms_norm(const uint16_t *x, int64_t x_stride, const uint16_t *weight, double eps, uint16_t *out,
                      int64_t num_rows, int64_t width, const Threads *threads) {
  Call call = {
      .x = x,
      .weight = weight,
      .out = out,
      .x_stride = x_stride,
      .num_rows = num_rows,
      .width = width,
      .eps = (float)eps,
      .row = rms_norm_row,
  };
  run_rows(&call, threads);
}
