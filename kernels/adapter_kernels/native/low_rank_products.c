// Shrink and expand of rows of one adapter, in tiles that stay in registers.
#include "low_rank.h"
#include "vectors.h"

#define TILE_ROWS 4
#define TILE_RANKS 4
#define STRIP_ROWS 8
// columns
#define AHEAD 256

// `num_rows` <= TILE_ROWS and `num_ranks` <= TILE_RANKS are constants where it is called
INLINE void shrink_tile(Rows x, const uint16_t *a, int64_t in_dim, int num_rows, int num_ranks, Rows bridge) {
  __m512 sums[TILE_ROWS][TILE_RANKS];
  for (int i = 0; i < TILE_ROWS; i++)
    for (int r = 0; r < TILE_RANKS; r++) sums[i][r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < in_dim; k += LANES) {
    const __mmask32 mask = first(in_dim - k);
    __m512i right[TILE_RANKS];
    for (int r = 0; r < num_ranks; r++) right[r] = loaded(a + r * in_dim + k, mask);
    for (int i = 0; i < num_rows; i++) {
      const __m512i left = loaded(x.data + i * x.stride + k, mask);
      for (int r = 0; r < num_ranks; r++) sums[i][r] = pairs_added(sums[i][r], left, right[r]);
    }
  }
  for (int i = 0; i < num_rows; i++) {
    const __m128 dots = folded(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    _mm_mask_storeu_epi16(bridge.data + i * bridge.stride, (__mmask8)((1u << num_ranks) - 1),
                          (__m128i)_mm_cvtneps_pbh(dots));
  }
}

INLINE void shrink_rows(Rows x, const uint16_t *a, int64_t in_dim, int num_rows, int64_t num_ranks, Rows bridge) {
  int64_t r = 0;
  // a lone row does little but read A: in one stream the processor reads ahead by itself
  for (; num_rows > 1 && r + TILE_RANKS <= num_ranks; r += TILE_RANKS)
    shrink_tile(x, a + r * in_dim, in_dim, num_rows, TILE_RANKS, rows_from(bridge, 0, r));
  for (; r < num_ranks; r++) shrink_tile(x, a + r * in_dim, in_dim, num_rows, 1, rows_from(bridge, 0, r));
}

void shrink(Rows x, const uint16_t *a, int64_t in_dim, int64_t count, int64_t num_ranks, Rows bridge) {
  for (int64_t i = 0; i < count; i += TILE_ROWS) {
    const Rows own = rows_from(x, i, 0), out = rows_from(bridge, i, 0);
    switch (count - i) {
      case 1: shrink_rows(own, a, in_dim, 1, num_ranks, out); break;
      case 2: shrink_rows(own, a, in_dim, 2, num_ranks, out); break;
      case 3: shrink_rows(own, a, in_dim, 3, num_ranks, out); break;
      default: shrink_rows(own, a, in_dim, TILE_ROWS, num_ranks, out);
    }
  }
}

// two rank rows, column after column side by side, as a product of pairs reads them
typedef struct {
  __m512i low, high;
} Pairs;

INLINE Pairs interleaved(__m512i even, __m512i odd) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  return (Pairs){_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)};
}

// the columns of `mask`; `num_rows` <= STRIP_ROWS is a constant where it is called
INLINE void expand_tile(Rows bridge, const uint16_t *bt, int64_t rank, int64_t width, int num_rows, __mmask32 mask,
                        Rows y) {
  __m512 low[STRIP_ROWS], high[STRIP_ROWS];
  for (int i = 0; i < num_rows; i++) low[i] = high[i] = _mm512_setzero_ps();
  for (int64_t r = 0; r < rank; r += 2) {
    const int has_odd = r + 1 < rank;
    // a lone row does little but read; the processor follows sixteen rank rows at once only when told
    if (num_rows == 1) {
      _mm_prefetch((const char *)(bt + r * width + AHEAD), _MM_HINT_T1);
      if (has_odd) _mm_prefetch((const char *)(bt + (r + 1) * width + AHEAD), _MM_HINT_T1);
    }
    const __m512i even = loaded(bt + r * width, mask);
    const __m512i odd = has_odd ? loaded(bt + (r + 1) * width, mask) : _mm512_setzero_si512();
    const Pairs pairs = interleaved(even, odd);
    for (int i = 0; i < num_rows; i++) {
      const uint16_t *own = bridge.data + i * bridge.stride + r;
      const __m512i both = _mm512_set1_epi32((int)(own[0] | (has_odd ? (uint32_t)own[1] << 16 : 0)));
      low[i] = pairs_added(low[i], both, pairs.low);
      high[i] = pairs_added(high[i], both, pairs.high);
    }
  }
  for (int i = 0; i < num_rows; i++) {
    uint16_t *own = y.data + i * y.stride;
    const __m512i before = loaded(own, mask);
    low[i] = _mm512_add_ps(low[i], widened_low(before));
    high[i] = _mm512_add_ps(high[i], widened_high(before));
    _mm512_mask_storeu_epi16(own, mask, (__m512i)_mm512_cvtne2ps_pbh(high[i], low[i]));
  }
}

void expand(Rows bridge, const uint16_t *bt, int64_t rank, int64_t width, int64_t count, int64_t num_columns, Rows y) {
  for (int64_t column = 0; column < num_columns; column += LANES) {
    const __mmask32 mask = first(num_columns - column);
    for (int64_t i = 0; i < count; i += STRIP_ROWS) {
      const Rows from = rows_from(bridge, i, 0), to = rows_from(y, i, column);
      switch (count - i) {
        case 1: expand_tile(from, bt + column, rank, width, 1, mask, to); break;
        case 2: expand_tile(from, bt + column, rank, width, 2, mask, to); break;
        case 3: expand_tile(from, bt + column, rank, width, 3, mask, to); break;
        case 4: expand_tile(from, bt + column, rank, width, 4, mask, to); break;
        case 5: expand_tile(from, bt + column, rank, width, 5, mask, to); break;
        case 6: expand_tile(from, bt + column, rank, width, 6, mask, to); break;
        case 7: expand_tile(from, bt + column, rank, width, 7, mask, to); break;
        default: expand_tile(from, bt + column, rank, width, STRIP_ROWS, mask, to);
      }
    }
  }
}
