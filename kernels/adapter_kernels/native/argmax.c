// The largest value of each row and where it stands: what greedy sampling reads of the logits.
#include <math.h>

#include "tasks.h"
#include "vectors.h"

typedef struct {
  const uint16_t *x;
  uint16_t *values;
  int64_t *indices;
  int64_t x_stride, num_rows, width;
  atomic_llong next;
} Call;

// the first of `count` values whose bits are those of a NaN, or that equal `wanted`; count: none
INLINE int64_t find(const uint16_t *x, int64_t count, float wanted) {
  const __m512 value = _mm512_set1_ps(wanted);
  const int kind = isnan(wanted) ? 1 : 0;
  for (int64_t c = 0; c < count; c += LANES) {
    const __m512i values = loaded(x + c, first(count - c));
    const __m512 low = widened_low(values), high = widened_high(values);
    const __mmask16 in_low = kind ? _mm512_cmp_ps_mask(low, low, _CMP_UNORD_Q) : _mm512_cmp_ps_mask(low, value, _CMP_EQ_OQ);
    const __mmask16 in_high =
        kind ? _mm512_cmp_ps_mask(high, high, _CMP_UNORD_Q) : _mm512_cmp_ps_mask(high, value, _CMP_EQ_OQ);
    const uint32_t found = ((uint32_t)in_high << 16 | in_low) & first(count - c);
    if (found) return c + __builtin_ctz(found);
  }
  return count;
}

// as torch does: of equal values the first, and a NaN is larger than everything
static int64_t largest(const uint16_t *x, int64_t width) {
  const __m512 least = _mm512_set1_ps(-INFINITY);
  __m512 found = least;
  __mmask16 has_nan = 0;
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask32 mask = first(width - c);
    const __m512i values = loaded(x + c, mask);
    const __m512 low = _mm512_mask_mov_ps(least, (__mmask16)mask, widened_low(values));
    const __m512 high = _mm512_mask_mov_ps(least, (__mmask16)(mask >> 16), widened_high(values));
    has_nan |= _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
    found = _mm512_max_ps(found, _mm512_max_ps(low, high));
  }
  return find(x, width, has_nan ? NAN : _mm512_reduce_max_ps(found));
}

static void row_tasks(void *data) {
  Call *call = data;
  for (int64_t i; (i = atomic_fetch_add(&call->next, 1)) < call->num_rows;) {
    const uint16_t *own = call->x + i * call->x_stride;
    call->indices[i] = largest(own, call->width);
    call->values[i] = own[call->indices[i]];
  }
}

// x [num_rows, width >= 1], rows x_stride apart; values and indices [num_rows]
void chorale_argmax(const uint16_t *x, int64_t x_stride, int64_t num_rows, int64_t width, uint16_t *values,
                    int64_t *indices, const Threads *threads) {
  Call call = {.x = x, .values = values, .indices = indices, .x_stride = x_stride, .num_rows = num_rows, .width = width};
  run_tasks(threads, row_tasks, &call, &call.next);
}
