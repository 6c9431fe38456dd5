// What a step does to the heads of its rows before they attend: queries and keys turned by position, keys and values
// written into the paged cache.
#include <string.h>

#include "tasks.h"
#include "vectors.h"

// as `adapter_kernels.native_layouts.PlaceCall` lays it out; all strides in values
typedef struct {
  // [num_rows, num_heads + num_kv_heads, head_dim], queries first, which are turned in place
  uint16_t *heads;
  // [num_rows, num_kv_heads, head_dim]
  const uint16_t *values;
  int64_t heads_stride, values_stride;
  // [num_rows, rotary_dim] each; the first half of the sines carries the minus sign
  const uint16_t *cosines, *sines;
  // [slots, num_kv_heads, head_dim]
  uint16_t *k, *v;
  // [num_rows], no value twice
  const int64_t *slots;
  int64_t num_rows, num_heads, num_kv_heads, head_dim, rotary_dim;
} PlaceCall;

typedef struct {
  const PlaceCall *place;
  atomic_llong next;
} Call;

// round(x * cosine) + other * sine, rounded: 32 values
INLINE __m512i turned(__m512i x, __m512i other, __m512i cosine, __m512i sine) {
  const __m512i scaled = narrowed(_mm512_mul_ps(widened_low(x), widened_low(cosine)),
                                  _mm512_mul_ps(widened_high(x), widened_high(cosine)));
  return narrowed(_mm512_fmadd_ps(widened_low(other), widened_low(sine), widened_low(scaled)),
                  _mm512_fmadd_ps(widened_high(other), widened_high(sine), widened_high(scaled)));
}

// one head into `out`, which may be `x` itself
INLINE void turn(const PlaceCall *call, int64_t row, const uint16_t *x, uint16_t *out) {
  const int64_t half = call->rotary_dim / 2;
  const uint16_t *cosines = call->cosines + row * call->rotary_dim, *sines = call->sines + row * call->rotary_dim;
  for (int64_t e = 0; e < half; e += LANES) {
    const __mmask32 mask = first(half - e);
    const __m512i left = loaded(x + e, mask), right = loaded(x + half + e, mask);
    const __m512i low = turned(left, right, loaded(cosines + e, mask), loaded(sines + e, mask));
    const __m512i high = turned(right, left, loaded(cosines + half + e, mask), loaded(sines + half + e, mask));
    _mm512_mask_storeu_epi16(out + e, mask, low);
    _mm512_mask_storeu_epi16(out + half + e, mask, high);
  }
  if (out != x) memcpy(out + 2 * half, x + 2 * half, (size_t)(call->head_dim - 2 * half) * sizeof *x);
}

static void place_row(const PlaceCall *call, int64_t row) {
  const int64_t head_dim = call->head_dim, width = call->num_kv_heads * head_dim;
  uint16_t *heads = call->heads + row * call->heads_stride;
  for (int64_t h = 0; h < call->num_heads; h++) turn(call, row, heads + h * head_dim, heads + h * head_dim);
  const uint16_t *keys = heads + call->num_heads * head_dim;
  uint16_t *k = call->k + call->slots[row] * width, *v = call->v + call->slots[row] * width;
  for (int64_t h = 0; h < call->num_kv_heads; h++) turn(call, row, keys + h * head_dim, k + h * head_dim);
  memcpy(v, call->values + row * call->values_stride, (size_t)width * sizeof *v);
}

static void place_tasks(void *data) {
  Call *call = data;
  for (int64_t row; (row = atomic_fetch_add(&call->next, 1)) < call->place->num_rows;) place_row(call->place, row);
}

void chorale_place(const PlaceCall *place, const Threads *threads) {
  const int64_t num_values = place->num_rows * (place->num_heads + 2 * place->num_kv_heads) * place->head_dim;
  Call call = {.place = place};
  run_light_tasks(threads, num_values, place_tasks, &call, &call.next);
}
