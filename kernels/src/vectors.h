// Vectors of floats with the same interface for AVX2 and AVX-512. Only files that are compiled for one of these
// instruction sets may include this one.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define VLPACK_INLINE inline __attribute__((always_inline))
#define VLPACK_BODY __attribute__((always_inline))  // of a lambda

namespace vlpack {
namespace {

#ifdef __AVX512F__

struct Floats {
  static constexpr int kLanes = 16;
  static constexpr int kColumns = 3;  // number of vectors in a row of a tile of registers
  static constexpr int kRows = 8;     // number of rows of a tile: 24 sums, 3 operands and a factor in 32 registers
  __m512 v;

  static VLPACK_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // bfloat16 numbers, which are the upper halves of floats
  static VLPACK_INLINE Floats load(const uint16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static VLPACK_INLINE Floats widen(__m256i halves) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
  static VLPACK_INLINE Floats all(float x) { return {_mm512_set1_ps(x)}; }
  VLPACK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  VLPACK_INLINE Floats operator+(Floats o) const { return {_mm512_add_ps(v, o.v)}; }
  VLPACK_INLINE Floats operator-(Floats o) const { return {_mm512_sub_ps(v, o.v)}; }
  VLPACK_INLINE Floats operator*(Floats o) const { return {_mm512_mul_ps(v, o.v)}; }
  VLPACK_INLINE Floats operator/(Floats o) const { return {_mm512_div_ps(v, o.v)}; }
  static VLPACK_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
  VLPACK_INLINE Floats abs() const { return {_mm512_abs_ps(v)}; }
  static VLPACK_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static VLPACK_INLINE bool any_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }
  // x where a < b, and y elsewhere
  static VLPACK_INLINE Floats where_less(Floats a, Floats b, Floats x, Floats y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
  // x minus its nearest integer
  static VLPACK_INLINE Floats fraction(Floats x) { return {_mm512_reduce_ps(x.v, 0)}; }
  // x · 2^n for a whole n, which may be far outside of the range of exponents
  static VLPACK_INLINE Floats scale(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }
};

#else

struct Floats {
  static constexpr int kLanes = 8;
  static constexpr int kColumns = 3;
  static constexpr int kRows = 4;  // 12 sums, 3 operands and a factor in 16 registers
  __m256 v;

  static VLPACK_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  // bfloat16 numbers, which are the upper halves of floats
  static VLPACK_INLINE Floats load(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static VLPACK_INLINE Floats all(float x) { return {_mm256_set1_ps(x)}; }
  VLPACK_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  VLPACK_INLINE Floats operator+(Floats o) const { return {_mm256_add_ps(v, o.v)}; }
  VLPACK_INLINE Floats operator-(Floats o) const { return {_mm256_sub_ps(v, o.v)}; }
  VLPACK_INLINE Floats operator*(Floats o) const { return {_mm256_mul_ps(v, o.v)}; }
  VLPACK_INLINE Floats operator/(Floats o) const { return {_mm256_div_ps(v, o.v)}; }
  static VLPACK_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
  VLPACK_INLINE Floats abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  static VLPACK_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static VLPACK_INLINE bool any_less(Floats a, Floats b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) != 0;
  }
  static VLPACK_INLINE Floats where_less(Floats a, Floats b, Floats x, Floats y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  static VLPACK_INLINE Floats fraction(Floats x) {
    return {_mm256_sub_ps(x.v, _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
  }
  // x · 2^n for a whole n; 0 below the range of normal exponents.
  static VLPACK_INLINE Floats scale(Floats x, Floats n) {
    const __m256 whole = _mm256_min_ps(_mm256_max_ps(n.v, _mm256_set1_ps(-126)), _mm256_set1_ps(127));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    const __m256 normal = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126), _CMP_NLT_UQ);  // true for NaN
    return {_mm256_and_ps(normal, _mm256_mul_ps(x.v, _mm256_castsi256_ps(bits)))};
  }
};

#endif

// Stores the sums of the lanes of four vectors.
VLPACK_INLINE void store_totals(Floats a, Floats b, Floats c, Floats d, float* four) {
#ifdef __AVX512F__
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 half = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
#endif
  _mm_storeu_ps(four, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// 2^x for x ≤ 0, with a relative error of at most 2e-7; exact for 0. Taylor's series has the terms ln(2)^n / n!.
VLPACK_INLINE Floats exp2(Floats x) {
  const Floats r = Floats::fraction(x);
  Floats y = Floats::fma(r, Floats::all(1.5403530e-4f), Floats::all(1.3333558e-3f));
  y = Floats::fma(y, r, Floats::all(9.6181291e-3f));
  y = Floats::fma(y, r, Floats::all(5.5504109e-2f));
  y = Floats::fma(y, r, Floats::all(2.4022651e-1f));
  y = Floats::fma(y, r, Floats::all(6.9314718e-1f));
  y = Floats::fma(y, r, Floats::all(1.0f));
  return Floats::scale(y, x - r);
}

}  // namespace
}  // namespace vlpack
