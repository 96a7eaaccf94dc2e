// Transposition of a square of 16 vectors of 16 numbers with 32 bits.
#pragma once

#ifdef __AVX512F__

#include "unroll.h"

namespace vlpack {
namespace {

VLPACK_INLINE void transpose(__m512 (&rows)[16]) {
  __m512 a[16];
  // squares of two, of four, and then whole vectors
  each<8>([&](auto i) VLPACK_BODY {
    a[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  });
  each<4>([&](auto i) VLPACK_BODY {
    rows[4 * i] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    rows[4 * i + 1] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    rows[4 * i + 2] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    rows[4 * i + 3] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  });
  each<4>([&](auto i) VLPACK_BODY {
    a[i] = _mm512_shuffle_f32x4(rows[i], rows[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_f32x4(rows[i], rows[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], 0xdd);
  });
  each<4>([&](auto i) VLPACK_BODY {
    rows[i] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
    rows[4 + i] = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0x88);
    rows[12 + i] = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0xdd);
  });
}

}  // namespace
}  // namespace vlpack

#endif
