// Products by 4-bit matrices and few rows, for the instruction set that the including file is compiled for.
//
// This is the form for few rows of x (linear4_many.h has the other one). Rows of x are quantized to 8 bits with one scale
// for each block of the matrix, so that products within a block are products of integers. A vector of codes is unpacked
// in registers and multiplied by the same columns of each row of x, so the matrix is read once, at the speed of memory.
// A byte of the matrix has the codes of two neighbouring columns. Unpacking a vector gives its even columns and then
// its odd ones; rows of x are stored in the same order.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "rows.h"
#include "unroll.h"

namespace vlpack {
namespace {

constexpr int kLanes4 = Floats::kLanes;
constexpr int kChunk4 = 2 * Bytes::kCount;       // number of columns in a vector of codes
constexpr int kLaneColumns = kChunk4 / kLanes4;  // number of columns in a lane: all of one block, which has at least 16

// Zero points of kLanes blocks of a row from block `first` on; lanes after the last block are arbitrary.
VLPACK_INLINE Floats zeros_of(const Linear4& l, int64_t row, int64_t first) {
  return l.zeros ? nibbles(l.zeros + row * ((l.blocks + 1) / 2) + first / 2, l.blocks - first) : Floats::all(8);
}

VLPACK_INLINE int64_t chunks_of(const Linear4& l) { return (l.blocks * l.block + kChunk4 - 1) / kChunk4; }

// Number of blocks in a vector of codes.
VLPACK_INLINE int parts_of(const Linear4& l) { return l.block < kChunk4 ? static_cast<int>(kChunk4 / l.block) : 1; }

// Index of a column among the unpacked codes.
VLPACK_INLINE int64_t place_of(int64_t column) {
  const int64_t within = column % kChunk4;
  return column - within + within % 2 * (kChunk4 / 2) + within / 2;
}

// The address of a vector of codes of a row. The layout of codes is [rows / kLaid, chunks, kLaid, kCount], which the
// form for few rows reads sequentially.
constexpr int kLaid = 4;

VLPACK_INLINE const uint8_t* codes_of(const Linear4& l, int64_t row, int64_t chunk) {
  return l.codes + ((row / kLaid * chunks_of(l) + chunk) * kLaid + row % kLaid) * Bytes::kCount;
}

inline int64_t laid_bytes(const Linear4& l) {
  return (l.rows + kLaid - 1) / kLaid * kLaid * chunks_of(l) * Bytes::kCount;
}

// Rearranges the codes of MatMulNBits, [rows, blocks, block / 2], into this layout; the rest is filled with zeros.
inline void lay(const Linear4& l, const uint8_t* codes, uint8_t* to) {
  const int64_t size = l.blocks * (l.block / 2), chunks = chunks_of(l);
  for (int64_t group = 0; group < l.rows; group += kLaid)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t row = group; row < group + kLaid; ++row, to += Bytes::kCount) {
        const int64_t at = chunk * Bytes::kCount, left = std::min<int64_t>(Bytes::kCount, size - at);
        if (row < l.rows && left == Bytes::kCount) {
          Bytes::load(codes + row * size + at).store(to);
        } else {
          Bytes::all(0).store(to);
          if (row < l.rows) std::memcpy(to, codes + row * size + at, left);
        }
      }
}

// The largest magnitude of some values; NaN if one of them is NaN. (As integers, the bits of magnitudes have the same
// order as the magnitudes, and those of NaN are larger than all others.)
VLPACK_INLINE float peak_of(const float* x, int64_t count) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    top = std::max(top, bits & 0x7fffffff);
  }
  float peak;
  std::memcpy(&peak, &top, sizeof peak);
  return peak;
}

// Quantizes values to whole steps of peak / 127, around 128. All codes are 128 if the peak is 0, infinite or NaN; the
// product is then 0, infinite or NaN because the scale is a multiple of the peak.
VLPACK_INLINE void quantize(const float* x, int64_t count, float peak, uint8_t* codes) {
  const float steps = 127 / peak;
  if (!(peak > 0) || !(steps > 0) || steps > 3e38f) return void(std::fill_n(codes, count, uint8_t{128}));
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(static_cast<int32_t>(x[i] * steps + 128.5f));
}

struct Few {
  static constexpr int kTaskRows = 64;
  static constexpr int kRows = kLanes4 == 16 ? 4 : 2;  // rows of the matrix at a time
  static constexpr int64_t kAhead = 4096;              // bytes of the matrix that are fetched in advance
  static constexpr int64_t kScalesAhead = 1024;        // and scales, if blocks are so small that there are many
  static constexpr int kLanes = kLanes4;

  static int64_t chunks(const Linear4& l) { return chunks_of(l); }

  // A packed row of x has signed codes [chunks, kChunk4]; for each lane of each chunk the scale of its block; and for
  // each block the scale times the sum of its codes, which is multiplied by the zero point.
  static int64_t scales_at(const Linear4& l) { return chunks(l) * kChunk4; }
  static int64_t sums_at(const Linear4& l) { return scales_at(l) + chunks(l) * kLanes * 4; }
  static int64_t row_room(const Linear4& l) { return (sums_at(l) + (l.blocks + kLanes) * 4 + 63) / 64 * 64; }

  static void pack(const Linear4& l, char* room, int64_t row) {
    int8_t* codes = reinterpret_cast<int8_t*>(room + row * row_room(l));
    float* scales = reinterpret_cast<float*>(room + row * row_room(l) + scales_at(l));
    float* sums = reinterpret_cast<float*>(room + row * row_room(l) + sums_at(l));
    std::memset(codes, 0, row_room(l));
    uint8_t* const block = scratch<uint8_t, 0>(l.block);
    const float* const values = prepared(l, row, l.cols);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t first = b * l.block, count = std::min(l.block, l.cols - first);
      const float* const x = values + first;
      const float peak = peak_of(x, count);
      quantize(x, count, peak, block);
      int32_t sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        codes[place_of(first + i)] = static_cast<int8_t>(block[i] - 128);
        sum += block[i] - 128;
      }
      for (int64_t column = first; column < first + l.block; column += kLaneColumns)
        scales[column / kLaneColumns] = peak / 127;
      sums[b] = peak / 127 * static_cast<float>(sum);
    }
  }

  static int64_t tasks(const Linear4& l) { return (l.rows + kTaskRows - 1) / kTaskRows; }

  static void run(const Linear4& l, const char* room, int64_t task) {
    const int64_t last = std::min(l.rows, (task + 1) * kTaskRows);
    int64_t row = task * kTaskRows;
    for (; row + kRows <= last; row += kRows) products<kRows>(l, room, row);
    for (; row < last; ++row) products<1>(l, room, row);
  }

  template <int Rows>
  static void products(const Linear4& l, const char* room, int64_t row) {
    for (int64_t first = 0; first < l.count; first += 4) {
      switch (std::min<int64_t>(4, l.count - first)) {
        case 1: product<Rows, 1>(l, room, row, first); break;
        case 2: product<Rows, 2>(l, room, row, first); break;
        case 3: product<Rows, 3>(l, room, row, first); break;
        default: product<Rows, 4>(l, room, row, first);
      }
    }
  }

  // The products of `Rows` rows of the matrix, from `row` on, and `Count` rows of x, from `first` on.
  template <int Rows, int Count>
  static VLPACK_INLINE void product(const Linear4& l, const char* room, int64_t row, int64_t first) {
    if (l.block >= kChunk4) return product<Rows, Count, true>(l, room, row, first);
    return product<Rows, Count, false>(l, room, row, first);
  }

  // The same; kWhole states that all columns of a vector of codes belong to one block.
  template <int Rows, int Count, bool kWhole>
  static void product(const Linear4& l, const char* room, int64_t row, int64_t first) {
    const char* x[Count];
    Floats sum[Rows][Count];
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) {
      x[i] = room + (first + i) * row_room(l);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r][i] = Floats::all(0);
    }
    const int64_t at = scales_at(l), all = chunks(l);
    const int parts = kWhole ? 1 : parts_of(l);
    const float* const scales = l.scales + row * l.blocks;
    for (int64_t chunk = 0; chunk < all; ++chunk) {
      const int64_t block = chunk * kChunk4 / l.block;
      const uint8_t* const codes = codes_of(l, row, chunk);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + r * Bytes::kCount + kAhead), _MM_HINT_T0);
        const Bytes packed = Bytes::load(codes + r * Bytes::kCount);
        const Bytes low = packed.low(), high = packed.high();
        const float* const these_scales = scales + r * l.blocks + block;
        if (!kWhole) _mm_prefetch(reinterpret_cast<const char*>(these_scales + kScalesAhead), _MM_HINT_T0);
        const Floats scale = repeat(these_scales, parts, l.blocks - block);
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i) {
          const char* const these = x[i] + chunk * kChunk4;
          const Sums codes = Sums::all(0).add(low, Bytes::load(these)).add(high, Bytes::load(these + kChunk4 / 2));
          const Floats of_x = Floats::load(reinterpret_cast<const float*>(x[i] + at) + chunk * kLanes);
          sum[r][i] = Floats::fma(codes.floats(), scale * of_x, sum[r][i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      for (int64_t b = 0; b < l.blocks; b += kLanes) {
        const Floats zeros =
            Floats::all(0) - load_some(scales + r * l.blocks + b, l.blocks - b) * zeros_of(l, row + r, b);
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i) {
          const float* sums = reinterpret_cast<const float*>(x[i] + sums_at(l));
          sum[r][i] = Floats::fma(zeros, Floats::load(sums + b), sum[r][i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i) finish(l, first + i, row + r, total(sum[r][i]));
    }
  }
};

}  // namespace
}  // namespace vlpack
