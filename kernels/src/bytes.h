// Vectors of bytes and their products, with the same interface for AVX2 and AVX-512 VNNI.
#pragma once

#include <cstring>

#include "vectors.h"

namespace vlpack {
namespace {

#ifdef __AVX512F__

struct Bytes {
  static constexpr int kCount = 64;
  __m512i v;

  static VLPACK_INLINE Bytes load(const void* p) { return {_mm512_loadu_si512(p)}; }
  VLPACK_INLINE Bytes low() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
  VLPACK_INLINE Bytes high() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
};

// A vector of 32-bit sums; each accumulates the products of four neighbouring bytes.
struct Sums {
  __m512i v;
  static VLPACK_INLINE Sums all(int32_t x) { return {_mm512_set1_epi32(x)}; }
  // a is unsigned, b is signed
  VLPACK_INLINE Sums add(Bytes a, Bytes b) const { return {_mm512_dpbusd_epi32(v, a.v, b.v)}; }
  VLPACK_INLINE Sums add_exactly(Bytes a, Bytes b) const { return add(a, b); }
  VLPACK_INLINE Sums operator+(Sums o) const { return {_mm512_add_epi32(v, o.v)}; }
  VLPACK_INLINE Floats floats() const { return {_mm512_cvtepi32_ps(v)}; }
  VLPACK_INLINE int32_t total() const { return _mm512_reduce_add_epi32(v); }
};

VLPACK_INLINE Sums integers(Floats x) { return {_mm512_cvtps_epi32(x.v)}; }

// The larger magnitude; NaN if one of them is. Neither is negative.
VLPACK_INLINE Floats larger(Floats a, Floats b) {
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}

// The lower half of each lane in both halves.
VLPACK_INLINE Sums twice(Sums x) {
  return {_mm512_or_si512(_mm512_slli_epi32(x.v, 16), _mm512_and_si512(x.v, _mm512_set1_epi32(0xffff)))};
}

// Multiplies 4-bit codes less a zero point by a ratio, both times powers of two that give 2¹⁵ together with the 2⁵ of
// codes, and stores the nearest integers plus 128: of the lower halves of bytes first, and then of the upper halves.
VLPACK_INLINE void round_codes(Bytes packed, Sums ratio, Sums zero, uint8_t* to) {
  const __m512i x = packed.v, first = _mm512_set1_epi16(0x1e0);  // a code times 2⁵
  const auto code = [&](__m512i shifted) VLPACK_BODY {
    return _mm512_mulhrs_epi16(_mm512_sub_epi16(_mm512_and_si512(shifted, first), zero.v), ratio.v);
  };
  const auto store = [&](__m512i even, __m512i odd, uint8_t* place) VLPACK_BODY {
    const __m512i both = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, _mm512_slli_epi16(odd, 8));
    _mm512_storeu_si512(place, _mm512_xor_si512(both, _mm512_set1_epi8(-128)));
  };
  store(code(_mm512_slli_epi16(x, 5)), code(_mm512_srli_epi16(x, 3)), to);
  store(code(_mm512_slli_epi16(x, 1)), code(_mm512_srli_epi16(x, 7)), to + 64);
}

VLPACK_INLINE Bytes spread(const void* four) {
  int32_t x;
  std::memcpy(&x, four, sizeof x);
  return {_mm512_set1_epi32(x)};
}

VLPACK_INLINE float total(Floats x) { return _mm512_reduce_add_ps(x.v); }

// A vector of the first `count` values, at most kLanes, followed by zeros.
VLPACK_INLINE Floats load_some(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(count < 16 ? (1u << count) - 1 : 0xffff, p)};
}
VLPACK_INLINE Floats load_some(const uint16_t* p, int64_t count) {
  return Floats::widen(_mm256_maskz_loadu_epi16(count < 16 ? (1u << count) - 1 : 0xffff, p));
}

VLPACK_INLINE void store_some(Floats x, float* p, int64_t count) {
  _mm512_mask_storeu_ps(p, count < 16 ? (1u << count) - 1 : 0xffff, x.v);
}

// Whether all values are below the limits; false if there is a NaN.
VLPACK_INLINE bool all_less(Floats x, Floats limits) {
  return _mm512_cmp_ps_mask(x.v, limits.v, _CMP_LT_OQ) == 0xffff;
}

// The nearest integers from -127 to 127, ties to even; NaN becomes -127.
VLPACK_INLINE Sums codes_of(Floats x) {
  return integers({_mm512_min_ps(_mm512_max_ps(x.v, _mm512_set1_ps(-127)), _mm512_set1_ps(127))});
}

// Stores kLanes codes as bytes.
VLPACK_INLINE void store_codes(Sums codes, char* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes.v));
}

// A vector of the first `count` 4-bit values, at most kLanes, low nibbles first. The other lanes are arbitrary.
VLPACK_INLINE Floats nibbles(const uint8_t* p, int64_t count) {
  const __m128i bytes = _mm_maskz_loadu_epi8(count < 16 ? (1u << (count + 1) / 2) - 1 : 0xff, p);
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)))};
}

#else

struct Bytes {
  static constexpr int kCount = 32;
  __m256i v;

  static VLPACK_INLINE Bytes load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  VLPACK_INLINE Bytes low() const { return {_mm256_and_si256(v, _mm256_set1_epi8(15))}; }
  VLPACK_INLINE Bytes high() const { return {_mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))}; }
};

struct Sums {
  __m256i v;
  static VLPACK_INLINE Sums all(int32_t x) { return {_mm256_set1_epi32(x)}; }
  // Pairs of products are added in 16 bits, which is exact if one factor is a 4-bit code (2 · 255 · 15 < 32768).
  VLPACK_INLINE Sums add(Bytes a, Bytes b) const {
    const __m256i pairs = _mm256_maddubs_epi16(a.v, b.v);
    return {_mm256_add_epi32(v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
  // The same for any bytes: products of even and of odd bytes in 32 bits.
  VLPACK_INLINE Sums add_exactly(Bytes a, Bytes b) const {
    const __m256i even_a = _mm256_and_si256(a.v, _mm256_set1_epi16(255)), odd_a = _mm256_srli_epi16(a.v, 8);
    const __m256i even_b = _mm256_srai_epi16(_mm256_slli_epi16(b.v, 8), 8), odd_b = _mm256_srai_epi16(b.v, 8);
    const __m256i even = _mm256_madd_epi16(even_a, even_b), odd = _mm256_madd_epi16(odd_a, odd_b);
    return {_mm256_add_epi32(v, _mm256_add_epi32(even, odd))};
  }
  VLPACK_INLINE Sums operator+(Sums o) const { return {_mm256_add_epi32(v, o.v)}; }
  VLPACK_INLINE void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  VLPACK_INLINE Floats floats() const { return {_mm256_cvtepi32_ps(v)}; }
  VLPACK_INLINE int32_t total() const {
    int32_t lanes[8];
    store(lanes);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  }
};

VLPACK_INLINE Sums integers(Floats x) { return {_mm256_cvtps_epi32(x.v)}; }

VLPACK_INLINE Floats larger(Floats a, Floats b) {
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
}

VLPACK_INLINE Sums twice(Sums x) {
  return {_mm256_or_si256(_mm256_slli_epi32(x.v, 16), _mm256_and_si256(x.v, _mm256_set1_epi32(0xffff)))};
}

VLPACK_INLINE void round_codes(Bytes packed, Sums ratio, Sums zero, uint8_t* to) {
  const __m256i x = packed.v, first = _mm256_set1_epi16(0x1e0);
  const auto code = [&](__m256i shifted) VLPACK_BODY {
    return _mm256_mulhrs_epi16(_mm256_sub_epi16(_mm256_and_si256(shifted, first), zero.v), ratio.v);
  };
  const auto store = [&](__m256i even, __m256i odd, uint8_t* place) VLPACK_BODY {
    const __m256i both = _mm256_blendv_epi8(even, _mm256_slli_epi16(odd, 8), _mm256_set1_epi16(-256));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm256_xor_si256(both, _mm256_set1_epi8(-128)));
  };
  store(code(_mm256_slli_epi16(x, 5)), code(_mm256_srli_epi16(x, 3)), to);
  store(code(_mm256_slli_epi16(x, 1)), code(_mm256_srli_epi16(x, 7)), to + 32);
}

VLPACK_INLINE Bytes spread(const void* four) {
  int32_t x;
  std::memcpy(&x, four, sizeof x);
  return {_mm256_set1_epi32(x)};
}

VLPACK_INLINE float total(Floats x) {
  alignas(32) float lanes[8];
  x.store(lanes);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <class Element>
VLPACK_INLINE Floats load_some(const Element* p, int64_t count) {
  if (count >= 8) return Floats::load(p);
  alignas(32) Element some[8] = {};
  std::memcpy(some, p, count * sizeof(Element));
  return Floats::load(some);
}

VLPACK_INLINE void store_some(Floats x, float* p, int64_t count) {
  if (count >= 8) return x.store(p);
  alignas(32) float some[8];
  x.store(some);
  std::memcpy(p, some, count * sizeof(float));
}

VLPACK_INLINE bool all_less(Floats x, Floats limits) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.v, limits.v, _CMP_LT_OQ)) == 0xff;
}

VLPACK_INLINE Sums codes_of(Floats x) {
  return integers({_mm256_min_ps(_mm256_max_ps(x.v, _mm256_set1_ps(-127)), _mm256_set1_ps(127))});
}

VLPACK_INLINE void store_codes(Sums codes, char* p) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes.v), _mm256_extracti128_si256(codes.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

VLPACK_INLINE Floats nibbles(const uint8_t* p, int64_t count) {
  int32_t four = 0;
  std::memcpy(&four, p, count < 8 ? (count + 1) / 2 : 4);
  const __m128i bytes = _mm_cvtsi32_si128(four), mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)))};
}

#endif

}  // namespace
}  // namespace vlpack
