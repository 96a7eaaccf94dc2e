// The layout of 4-bit matrices, for the instruction set that the including file is compiled for.
//
// A panel has kLanes rows, as those of 8-bit matrices do. A vector has eight columns of them: each byte of a lane has the
// code of one of the first four columns and, in its upper half, that of one of the other four.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "rows.h"
#include "transpose.h"

namespace vlpack {
namespace {

constexpr int kLanes4 = Floats::kLanes;
constexpr int kColumns4 = 8;  // columns of a vector of codes

VLPACK_INLINE int64_t panels4(const Linear4& l) { return (l.rows + kLanes4 - 1) / kLanes4; }
VLPACK_INLINE int64_t panel_bytes4(const Linear4& l) { return l.blocks * l.block / kColumns4 * Bytes::kCount; }

inline int64_t laid_bytes(const Linear4& l) { return panels4(l) * panel_bytes4(l); }

// Rearranges the codes of MatMulNBits, [rows, blocks, block / 2], in which a byte has two neighbouring columns.
inline void lay(const Linear4& l, const uint8_t* codes, uint8_t* to) {
  const int64_t row_bytes = l.blocks * l.block / 2;
  for (int64_t panel = 0; panel < panels4(l); ++panel)
    for (int64_t at = 0; at < row_bytes; at += 4)
      for (int64_t row = panel * kLanes4; row < (panel + 1) * kLanes4; ++row, to += 4) {
        uint32_t x = 0;
        if (row < l.rows) std::memcpy(&x, codes + row * row_bytes + at, 4);
        // columns 0 1 2 3 4 5 6 7, from the lowest bits on, become 0 4 1 5 2 6 3 7
        uint32_t swap = (x ^ x >> 8) & 0x0000ff00;
        x ^= swap ^ swap << 8;
        swap = (x ^ x >> 4) & 0x00f000f0;
        x ^= swap ^ swap << 4;
        std::memcpy(to, &x, 4);
      }
}

// The product as one by an 8-bit matrix with blocks of `block` columns, still without the matrix.
VLPACK_INLINE Linear8 in_8_bits(const Linear4& l, int64_t block) {
  Linear8 w{};
  static_cast<Product&>(w) = l;
  w.block = block;
  return w;
}

// The scales and zero points of the blocks of a panel, [blocks, kLanes]; those of rows that do not exist are 0.
struct Blocks4 {
  const float *scales, *zeros;  // zeros is null if all zero points are 8

  Blocks4(const Linear4& l, int64_t panel) : zeros(nullptr) {
    const int64_t first = panel * kLanes4, rows = std::min<int64_t>(kLanes4, l.rows - first);
    const int64_t size = (l.blocks + kLanes4 - 1) / kLanes4 * kLanes4;
    float* const all = scratch<float, 4>(2 * size * kLanes4);
    scales = all;
    lay_panel(l, rows, all, [&](int64_t row, int64_t block) VLPACK_BODY {
      return load_some(l.scales + (first + row) * l.blocks + block, std::min<int64_t>(kLanes4, l.blocks - block));
    });
    if (!l.zeros) return;
    zeros = all + size * kLanes4;
    lay_panel(l, rows, all + size * kLanes4, [&](int64_t row, int64_t block) VLPACK_BODY {
      return nibbles(l.zeros + (first + row) * ((l.blocks + 1) / 2) + block / 2, l.blocks - block);
    });
  }

  VLPACK_INLINE Floats scale(int64_t block) const { return Floats::load(scales + block * kLanes4); }
  VLPACK_INLINE Floats zero(int64_t block) const {
    return zeros ? Floats::load(zeros + block * kLanes4) : Floats::all(8);
  }

 private:
  template <class Load>
  static VLPACK_INLINE void lay_panel(const Linear4& l, int64_t rows, float* to, const Load& load) {
    for (int64_t block = 0; block < l.blocks; block += kLanes4) {
      Floats lines[kLanes4];
      for (int64_t row = 0; row < kLanes4; ++row) lines[row] = row < rows ? load(row, block) : Floats::all(0);
      transpose(lines);
      for (int64_t i = 0; i < kLanes4; ++i) lines[i].store(to + (block + i) * kLanes4);
    }
  }
};

}  // namespace
}  // namespace vlpack
