// Products by 4-bit matrices, for the instruction set that the including file is compiled for.
//
// Rows of x are quantized to 8 bits with one scale for each block of the matrix, so that products within a block are
// products of integers. There are two forms:
// - Few rows of x: a vector of codes is unpacked in registers and multiplied by the same columns of each row of x. The
//   matrix is read once, at the speed of memory.
// - Many rows of x: a task unpacks kTaskRows rows of the matrix to bytes. A vector holds the same four columns of
//   neighbouring rows of x, and four bytes of the matrix are broadcast to a vector.
// A byte of the matrix has the codes of two neighbouring columns. Unpacking a vector gives its even columns and then
// its odd ones; rows of x are stored in the same order.
#pragma once

#include <algorithm>
#include <cmath>

#include "bytes.h"
#include "kernels.h"
#include "scratch.h"
#include "unroll.h"

namespace vlpack {
namespace {

constexpr int64_t kFewRows = 12;  // largest number of rows of x for the form for few rows

constexpr int kLanes4 = Floats::kLanes;
constexpr int kChunk = 2 * Bytes::kCount;       // number of columns in a vector of codes
constexpr int kLaneColumns = kChunk / kLanes4;  // number of columns in a lane: all of one block, which has at least 16

// Zero points of kLanes blocks of a row from block `first` on; lanes after the last block are arbitrary.
VLPACK_INLINE Floats zeros_of(const Linear4& l, int64_t row, int64_t first) {
  return l.zeros ? nibbles(l.zeros + row * ((l.blocks + 1) / 2) + first / 2, l.blocks - first) : Floats::all(8);
}

VLPACK_INLINE int64_t chunks_of(const Linear4& l) { return (l.blocks * l.block + kChunk - 1) / kChunk; }

// Number of blocks in a vector of codes.
VLPACK_INLINE int parts_of(const Linear4& l) { return l.block < kChunk ? static_cast<int>(kChunk / l.block) : 1; }

// Index of a column among the unpacked codes.
VLPACK_INLINE int64_t place_of(int64_t column) {
  const int64_t within = column % kChunk;
  return column - within + within % 2 * (kChunk / 2) + within / 2;
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

  // A packed row of x has signed codes [chunks, kChunk]; for each lane of each chunk the scale of its block; and for
  // each block the scale times the sum of its codes, which is multiplied by the zero point.
  static int64_t scales_at(const Linear4& l) { return chunks(l) * kChunk; }
  static int64_t sums_at(const Linear4& l) { return scales_at(l) + chunks(l) * kLanes * 4; }
  static int64_t row_room(const Linear4& l) { return (sums_at(l) + (l.blocks + kLanes) * 4 + 63) / 64 * 64; }

  static void pack(const Linear4& l, char* room, int64_t row) {
    int8_t* codes = reinterpret_cast<int8_t*>(room + row * row_room(l));
    float* scales = reinterpret_cast<float*>(room + row * row_room(l) + scales_at(l));
    float* sums = reinterpret_cast<float*>(room + row * row_room(l) + sums_at(l));
    std::memset(codes, 0, row_room(l));
    uint8_t* const block = scratch<uint8_t, 0>(l.block);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t first = b * l.block, count = std::min(l.block, l.cols - first);
      const float* x = l.x + row * l.cols + first;
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
    if (l.block >= kChunk) return product<Rows, Count, true>(l, room, row, first);
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
      const int64_t block = chunk * kChunk / l.block;
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
          const char* const these = x[i] + chunk * kChunk;
          const Sums codes = Sums::all(0).add(low, Bytes::load(these)).add(high, Bytes::load(these + kChunk / 2));
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
      for (int i = 0; i < Count; ++i) l.y[(first + i) * l.rows + row + r] = total(sum[r][i]);
    }
  }
};

struct Many {
  static constexpr int kLanes = kLanes4;
  static constexpr int kColumns = kLanes == 16 ? 3 : 1;  // vectors of rows of x
  static constexpr int kRows = kLanes == 16 ? 8 : 4;     // rows of the matrix
  static constexpr int kTaskRows = 32;

  // A group of kLanes rows of x has unsigned codes around 128, [width / 4, kLanes, 4], and scales [blocks, kLanes].
  static int64_t width(const Linear4& l) { return chunks_of(l) * kChunk; }
  static int64_t group_room(const Linear4& l) { return (width(l) + l.blocks * 4) * kLanes; }
  static int64_t groups(const Linear4& l) { return (l.count + kLanes - 1) / kLanes; }

  static void pack(const Linear4& l, char* room, int64_t group) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(room + group * group_room(l));
    float* scales = reinterpret_cast<float*>(codes + width(l) * kLanes);
    uint8_t* const row_codes = scratch<uint8_t, 1>(2 * width(l));
    uint8_t* const sorted = row_codes + width(l);
    std::memset(row_codes, 128, width(l));
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t row = group * kLanes + lane;
      for (int64_t b = 0; b < l.blocks; ++b) {
        const int64_t first = b * l.block, count = row < l.count ? std::min(l.block, l.cols - first) : 0;
        const float* x = l.x + row * l.cols + first;
        const float peak = peak_of(x, count);
        quantize(x, count ? count : l.block, peak, row_codes + first);
        scales[b * kLanes + lane] = peak / 127;
      }
      for (int64_t chunk = 0; chunk < width(l); chunk += kChunk)
        for (int64_t i = 0; i < kChunk / 2; ++i) {
          sorted[chunk + i] = row_codes[chunk + 2 * i];
          sorted[chunk + kChunk / 2 + i] = row_codes[chunk + 2 * i + 1];
        }
      for (int64_t i = 0; i < width(l); i += 4) std::memcpy(codes + i * kLanes + lane * 4, sorted + i, 4);
    }
  }

  static int64_t tasks(const Linear4& l) { return (l.rows + kTaskRows - 1) / kTaskRows; }

  static void run(const Linear4& l, const char* room, int64_t task) {
    const int64_t first = task * kTaskRows, rows = std::min<int64_t>(kTaskRows, l.rows - first);
    int8_t* const weight = scratch<int8_t, 2>(kTaskRows * width(l));
    int32_t* const offsets = scratch<int32_t, 3>(kTaskRows * l.blocks);
    for (int64_t row = 0; row < rows; ++row)
      unpack(l, first + row, weight + row * width(l), offsets + row * l.blocks);
    const int64_t all = groups(l);
    for (int64_t group = 0; group < all; group += kColumns) {
      int64_t row = 0;
      for (; row + kRows <= rows; row += kRows)
        tile<kRows>(l, room, group, first + row, weight + row * width(l), offsets + row * l.blocks);
      for (; row < rows; ++row)
        tile<1>(l, room, group, first + row, weight + row * width(l), offsets + row * l.blocks);
    }
  }

  // Unpacks a row of the matrix to differences from the zero points. `offsets` cancel what the 128 in codes of x adds
  // to each block's product.
  static void unpack(const Linear4& l, int64_t row, int8_t* to, int32_t* offsets) {
    const int64_t all = chunks_of(l);
    int32_t* const zeros = scratch<int32_t, 4>(l.blocks + 3 * kLanes);  // each has four equal bytes
    for (int64_t b = 0; b < l.blocks; b += kLanes) {
      repeat_bytes(integers(zeros_of(l, row, b))).store(zeros + b);
    }
    for (int64_t b = 0; b < l.blocks; ++b) offsets[b] = 0;
    const int parts = parts_of(l);
    for (int64_t chunk = 0; chunk < all; ++chunk) {
      const int64_t block = chunk * kChunk / l.block;
      const Bytes packed = Bytes::load(codes_of(l, row, chunk));
      const Bytes zero = Bytes::bits(repeat(reinterpret_cast<const float*>(zeros) + block, parts, l.blocks - block));
      const Bytes low = packed.low() - zero, high = packed.high() - zero;
      low.store(to + chunk * kChunk), high.store(to + chunk * kChunk + kChunk / 2);
      const Sums sums = Sums::all(0).add(Bytes::all(1), low).add(Bytes::all(1), high);
      sums.subtract_parts(parts, l.blocks - block, offsets + block);
    }
  }

  template <int kCount>
  static void tile(const Linear4& l, const char* room, int64_t group, int64_t row, const int8_t* weight,
                   const int32_t* offsets) {
    const int64_t left = groups(l) - group;
    if (kColumns == 1 || left == 1) return tile_of<1, kCount>(l, room, group, row, weight, offsets);
    if (left == 2) return tile_of<2, kCount>(l, room, group, row, weight, offsets);
    return tile_of<kColumns, kCount>(l, room, group, row, weight, offsets);
  }

  // Adds the products of four columns to the sums.
  template <int Columns, int kCount>
  static VLPACK_INLINE void step(
      const char* x, int64_t size, const int8_t* weight, int64_t wide, Sums (&products)[kCount * Columns]) {
    Bytes operand[Columns];
    each<Columns>([&](auto c) VLPACK_BODY { operand[c] = Bytes::load(x + c * size); });
    each<kCount>([&](auto r) VLPACK_BODY {
      const Bytes factor = spread(weight + r * wide);
      each<Columns>([&](auto c) VLPACK_BODY {
        products[r * Columns + c] = products[r * Columns + c].add(operand[c], factor);
      });
    });
  }

  // The products of kCount rows of the matrix and `Columns` groups of rows of x.
  template <int Columns, int kCount>
  static void tile_of(
      const Linear4& l, const char* room, int64_t group, int64_t row, const int8_t* weight, const int32_t* offsets) {
    constexpr int kSums = kCount * Columns;  // sum i is that of row i / Columns and group i % Columns
    const int64_t size = group_room(l), wide = width(l);
    const char* const x = room + group * size;
    const char* const scales = x + wide * kLanes;
    Floats sum[kSums];
    each<kSums>([&](auto i) VLPACK_BODY { sum[i] = Floats::all(0); });
    for (int64_t b = 0; b < l.blocks; ++b) {
      Sums products[kSums];
      each<kSums>([&](auto i) VLPACK_BODY { products[i] = Sums::all(offsets[i / Columns * l.blocks + b]); });
      // The block's even columns lie in one vector of codes, and its odd ones in the next.
      const int64_t span = std::min<int64_t>(l.block, kChunk) / 2, first = b * l.block;
      for (int64_t at = place_of(first); at < place_of(first) + l.block; at += kChunk)
        for (int64_t i = at; i < at + span; i += 4) {
          step<Columns, kCount>(x + i * kLanes, size, weight + i, wide, products);
          step<Columns, kCount>(x + (i + kChunk / 2) * kLanes, size, weight + i + kChunk / 2, wide, products);
        }
      Floats of_x[Columns];
      each<Columns>([&](auto c) VLPACK_BODY {
        of_x[c] = Floats::load(reinterpret_cast<const float*>(scales + c * size) + b * kLanes);
      });
      each<kCount>([&](auto r) VLPACK_BODY {
        const Floats scale = Floats::all(l.scales[(row + r) * l.blocks + b]);
        each<Columns>([&](auto c) VLPACK_BODY {
          constexpr int i = r * Columns + c;
          sum[i] = Floats::fma(products[i].floats(), scale * of_x[c], sum[i]);
        });
      });
    }
    alignas(64) float lanes[kCount][Columns * kLanes];
    each<kSums>([&](auto i) VLPACK_BODY { sum[i].store(&lanes[i / Columns][i % Columns * kLanes]); });
    const int64_t first = group * kLanes, count = std::min<int64_t>(Columns * kLanes, l.count - first);
    for (int64_t i = 0; i < count; ++i)
      for (int r = 0; r < kCount; ++r) l.y[(first + i) * l.rows + row + r] = lanes[r][i];
  }
};

// The product in the form that suits the number of rows of x.
struct Multiply4 {
  static bool few(const Linear4& l) { return l.count <= kFewRows; }
  static int64_t room(const Linear4& l) {
    return few(l) ? l.count * Few::row_room(l) : Many::groups(l) * Many::group_room(l);
  }
  static int64_t packs(const Linear4& l) { return few(l) ? l.count : Many::groups(l); }
  static void pack(const Linear4& l, void* room, int64_t task) {
    return few(l) ? Few::pack(l, static_cast<char*>(room), task) : Many::pack(l, static_cast<char*>(room), task);
  }
  static int64_t tasks(const Linear4& l) { return few(l) ? Few::tasks(l) : Many::tasks(l); }
  static void run(const Linear4& l, const void* room, int64_t task) {
    const char* from = static_cast<const char*>(room);
    return few(l) ? Few::run(l, from, task) : Many::run(l, from, task);
  }
};

}  // namespace
}  // namespace vlpack
