// Transposition of a square of vectors, for the instruction set that the including file is compiled for.
#pragma once

#include "unroll.h"

namespace vlpack {
namespace {

VLPACK_INLINE void transpose(Floats (&rows)[Floats::kLanes]) {
#ifdef __AVX512F__
  Floats a[16];
  // squares of two, of four, and then whole vectors
  each<8>([&](auto i) VLPACK_BODY {
    a[2 * i] = {_mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v)};
    a[2 * i + 1] = {_mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v)};
  });
  each<4>([&](auto i) VLPACK_BODY {
    rows[4 * i] = {_mm512_shuffle_ps(a[4 * i].v, a[4 * i + 2].v, 0x44)};
    rows[4 * i + 1] = {_mm512_shuffle_ps(a[4 * i].v, a[4 * i + 2].v, 0xee)};
    rows[4 * i + 2] = {_mm512_shuffle_ps(a[4 * i + 1].v, a[4 * i + 3].v, 0x44)};
    rows[4 * i + 3] = {_mm512_shuffle_ps(a[4 * i + 1].v, a[4 * i + 3].v, 0xee)};
  });
  each<4>([&](auto i) VLPACK_BODY {
    a[i] = {_mm512_shuffle_f32x4(rows[i].v, rows[4 + i].v, 0x88)};
    a[4 + i] = {_mm512_shuffle_f32x4(rows[i].v, rows[4 + i].v, 0xdd)};
    a[8 + i] = {_mm512_shuffle_f32x4(rows[8 + i].v, rows[12 + i].v, 0x88)};
    a[12 + i] = {_mm512_shuffle_f32x4(rows[8 + i].v, rows[12 + i].v, 0xdd)};
  });
  each<4>([&](auto i) VLPACK_BODY {
    rows[i] = {_mm512_shuffle_f32x4(a[i].v, a[8 + i].v, 0x88)};
    rows[8 + i] = {_mm512_shuffle_f32x4(a[i].v, a[8 + i].v, 0xdd)};
    rows[4 + i] = {_mm512_shuffle_f32x4(a[4 + i].v, a[12 + i].v, 0x88)};
    rows[12 + i] = {_mm512_shuffle_f32x4(a[4 + i].v, a[12 + i].v, 0xdd)};
  });
#else
  float numbers[8][8];
  for (int row = 0; row < 8; ++row) {
    float line[8];
    rows[row].store(line);
    for (int lane = 0; lane < 8; ++lane) numbers[lane][row] = line[lane];
  }
  for (int row = 0; row < 8; ++row) rows[row] = Floats::load(numbers[row]);
#endif
}

}  // namespace
}  // namespace vlpack
