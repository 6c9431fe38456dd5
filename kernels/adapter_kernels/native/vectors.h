// Vectors of bf16 on AVX-512-BF16: 32 values in a register, products of neighbouring pairs summed in fp32.
#ifndef CHORALE_VECTORS_H
#define CHORALE_VECTORS_H
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 32
#define INLINE static inline __attribute__((always_inline))

INLINE __m512i loaded(const uint16_t *values, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, values); }

// the mask of the first `count` lanes, all of them from LANES on
INLINE __mmask32 first(int64_t count) { return count >= LANES ? 0xffffffffu : (1u << count) - 1; }

// sum[i] + left[2 i] * right[2 i] + left[2 i + 1] * right[2 i + 1]
INLINE __m512 pairs_added(__m512 sum, __m512i left, __m512i right) {
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}

INLINE __m512 widened(__m256i values) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16); }

INLINE __m512 widened_low(__m512i values) { return widened(_mm512_castsi512_si256(values)); }

INLINE __m512 widened_high(__m512i values) { return widened(_mm512_extracti64x4_epi64(values, 1)); }

// two neighbouring values, sixteen times
INLINE __m512i repeated_pair(const uint16_t *values) {
  int32_t pair;
  memcpy(&pair, values, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// pairs of a's and b's values at the same place: those of the first 16 places, those of the last
INLINE __m512i paired_low(__m512i a, __m512i b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(a));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(b)), 16));
}

INLINE __m512i paired_high(__m512i a, __m512i b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(a, 1));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1)), 16));
}

// 16 rows of 16 values of 32 bits each become columns
INLINE void transpose(__m512i rows[16]) {
  __m512i twos[16], fours[16], eights[16];
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + 2 + j]);
    }
  // fours[4 i + c]: in lane l the values at 4 l + c of rows 4 i to 4 i + 3
  for (int c = 0; c < 4; c++) {
    eights[c] = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    eights[4 + c] = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    eights[8 + c] = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    eights[12 + c] = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; c++) {
    rows[c] = _mm512_shuffle_i32x4(eights[c], eights[8 + c], 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(eights[c], eights[8 + c], 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(eights[4 + c], eights[12 + c], 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(eights[4 + c], eights[12 + c], 0xdd);
  }
}

// both halves of 32 values, rounded to bf16
INLINE __m512i narrowed(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// the sums over the lanes of four vectors
INLINE __m128 folded(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 sums[4] = {a, b, c, d};
  __m128 quarters[4];
  for (int i = 0; i < 4; i++) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums[i]), _mm512_extractf32x8_ps(sums[i], 1));
    quarters[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  return _mm_hadd_ps(_mm_hadd_ps(quarters[0], quarters[1]), _mm_hadd_ps(quarters[2], quarters[3]));
}

// e^x for x <= 0, to 2 ulp of fp32; 0 where fp32 has nothing smaller, NaN for NaN
INLINE __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.428606765330187045e-6f), r);
  // Taylor's series; |r| <= ln 2 / 2 leaves less than 1e-8
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (int i = 0; i < 7; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(terms[i]));
  return _mm512_scalef_ps(sum, n);
}

#endif
