// Products by 8-bit matrices, for the instruction set that the including file is compiled for.
//
// Codes of the matrix are stored as unsigned numbers around 128 in panels of kLanes rows: a vector holds the same four
// columns of the rows of a panel, and four signed codes of x are broadcast to a vector. Sums begin with what cancels
// the 128. A tile is the product of some rows of x and some panels:
// - Few rows of x: a tile has all of them and a single panel, so the matrix is read once, sequentially.
// - Many rows of x: a task has kPanels panels, which stay in the second-level cache, and a tile kTile rows of x.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "linear8.h"
#include "rows.h"
#include "unroll.h"

namespace vlpack {
namespace {

struct Multiply8 {
  static constexpr int kLanes = Floats::kLanes;
  static constexpr int kVector = Bytes::kCount;          // bytes of four columns of a panel
  static constexpr int kFew = kLanes == 16 ? 16 : 4;     // largest number of rows of x for the form for few rows
  static constexpr int kTile = kLanes == 16 ? 8 : 4;     // rows of x in a tile of the other form
  static constexpr int kPanels = kLanes == 16 ? 3 : 2;   // and its panels
  static constexpr int kFewPanels = 64 / kLanes;         // panels of a task with few rows of x
  static constexpr int kChunk = 64;                      // neighbouring codes of a row of x
  static constexpr int kChunkSteps = kChunk / 4;         // steps of four columns
  static constexpr int64_t kAhead = 8192;                // bytes of the matrix that are fetched in advance

  static int64_t steps(const Linear8& l) { return ((l.block ? l.blocks() * l.block : l.cols) + 3) / 4; }
  static int64_t panels(const Linear8& l) { return (l.rows + kLanes - 1) / kLanes; }
  static int64_t panel_bytes(const Linear8& l) { return steps(l) * kVector; }

  static int64_t bytes(const Linear8& l) { return panels(l) * panel_bytes(l); }

  // The layout of codes is [panels, steps, kLanes, 4].
  static void lay(const Linear8& l, const uint8_t* codes, uint8_t* to) {
    if (l.block) return lay_rows(l, codes, to);
    constexpr int64_t kSteps = 16;  // steps whose rows of codes are read at the same time
    for (int64_t begin = 0; begin < steps(l); begin += kSteps)
      for (int64_t panel = 0; panel < panels(l); ++panel)
        for (int64_t step = begin; step < std::min(begin + kSteps, steps(l)); ++step) {
          const int64_t left = l.cols - step * 4;
          const uint8_t* const from = codes + step * 4 * l.rows + panel * kLanes;
          lay_step(from, l.rows, l.rows - panel * kLanes, left, to + panel * panel_bytes(l) + step * kVector);
        }
  }

  // Four columns of a panel, of which `rows` and `cols` exist.
  static VLPACK_INLINE void lay_step(const uint8_t* from, int64_t stride, int64_t rows, int64_t cols, uint8_t* to) {
    if (rows >= kLanes && cols >= 4) {
      __m128i line[4];
      for (int i = 0; i < 4; ++i) {
        line[i] = kLanes == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride))
                               : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i * stride));
        line[i] = _mm_xor_si128(line[i], _mm_set1_epi8(-128));
      }
      const __m128i low[2] = {_mm_unpacklo_epi8(line[0], line[1]), _mm_unpacklo_epi8(line[2], line[3])};
      const __m128i high[2] = {_mm_unpackhi_epi8(line[0], line[1]), _mm_unpackhi_epi8(line[2], line[3])};
      __m128i* const out = reinterpret_cast<__m128i*>(to);
      _mm_storeu_si128(out, _mm_unpacklo_epi16(low[0], low[1]));
      _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low[0], low[1]));
      if (kLanes == 8) return;
      _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high[0], high[1]));
      _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high[0], high[1]));
      return;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for (int64_t i = 0; i < 4; ++i) to[lane * 4 + i] = lane < rows && i < cols ? from[i * stride + lane] ^ 128 : 128;
  }

  // The same for codes [rows, blocks, block], which are unsigned already.
  static void lay_rows(const Linear8& l, const uint8_t* codes, uint8_t* to) {
    const int64_t width = steps(l) * 4;
    for (int64_t row = 0; row < panels(l) * kLanes; ++row) {
      uint8_t* const start = to + row / kLanes * panel_bytes(l) + row % kLanes * 4;
      for (int64_t step = 0; step < steps(l); ++step) {
        if (row < l.rows)
          std::memcpy(start + step * kVector, codes + row * width + step * 4, 4);
        else
          std::memset(start + step * kVector, 128, 4);
      }
    }
  }

  // The layout of scales of blocks is [panels, blocks, kLanes].
  static int64_t scales(const Linear8& l) { return panels(l) * l.blocks() * kLanes; }
  static void lay_scales(const Linear8& l, const float* scales, float* to) {
    for (int64_t panel = 0; panel < panels(l); ++panel)
      for (int64_t block = 0; block < l.blocks(); ++block)
        for (int64_t row = panel * kLanes; row < (panel + 1) * kLanes; ++row)
          *to++ = row < l.rows ? scales[row * l.blocks() + block] : 0;
  }

  // The quantized rows of x: codes [count / tile, chunks, tile, kChunk], where the last tile may have fewer rows; for
  // each row and block its factor, and -128 times the sum of its codes.
  static int64_t tile(const Linear8& l) { return l.count <= kFew ? l.count : kTile; }
  static int64_t width(const Linear8& l) { return (steps(l) * 4 + kChunk - 1) / kChunk * kChunk; }
  static int64_t factors_at(const Linear8& l) { return l.count * width(l); }
  static int64_t room(const Linear8& l) { return factors_at(l) + l.count * l.blocks() * 8; }
  static const float* factors(const Linear8& l, const char* room) {
    return reinterpret_cast<const float*>(room + factors_at(l));
  }
  static const int32_t* offsets(const Linear8& l, const char* room) {
    return reinterpret_cast<const int32_t*>(room + factors_at(l)) + l.count * l.blocks();
  }

  static int64_t packs(const Linear8& l) { return l.count; }

  static void pack(const Linear8& l, void* room, int64_t row) {
    char* const start = static_cast<char*>(room);
    const int64_t size = l.block ? l.block : width(l), first = row / tile(l) * tile(l);
    const int64_t stride = std::min(tile(l), l.count - first) * kChunk;
    char* const to = start + first * width(l) + (row - first) * kChunk;
    const float* const values = prepared(l, row, l.blocks() * size);
    float* const factor = const_cast<float*>(factors(l, start)) + row * l.blocks();
    int32_t* const offset = const_cast<int32_t*>(offsets(l, start)) + row * l.blocks();
    for (int64_t b = 0; b < l.blocks(); ++b) {
      const float peak = largest(values + b * size, size);
      factor[b] = l.block ? peak / 127 : peak + 1e-20f;
      offset[b] = -128 * (l.block ? quantize_block(values, b * size, size, peak, to, stride)
                                  : quantize_row(values, size, factor[b], to, stride));
    }
    for (int64_t i = l.blocks() * size; i < width(l); i += 8) std::memset(to + i / kChunk * stride + i % kChunk, 0, 8);
  }

  // The largest magnitude of `count` values, a multiple of 16; NaN if one of them is NaN.
  static VLPACK_INLINE float largest(const float* x, int64_t count) {
    uint32_t tops[16] = {};
    for (int64_t i = 0; i < count; i += 16)
      for (int64_t j = 0; j < 16; ++j) {
        uint32_t bits;
        std::memcpy(&bits, x + i + j, sizeof bits);
        tops[j] = std::max(tops[j], bits & 0x7fffffff);
      }
    const uint32_t top = *std::max_element(tops, tops + 16);
    float peak;
    std::memcpy(&peak, &top, sizeof peak);
    return peak;
  }

  // Quantizes a row exactly as the nodes Div and QuantizeLinear do, and returns the sum of its codes. A product with the
  // inverse differs from their quotients by less than 5e-5, so these are computed only near ties.
  static int32_t quantize_row(const float* x, int64_t count, float peak, char* to, int64_t stride) {
    constexpr int kVectors = kChunk / kLanes;
    const float inverse = 127 / peak;
    const Floats divisor = Floats::all(peak), step = Floats::all(kStep);
    const Floats steps = Floats::all(inverse), near = Floats::all(inverse < 3e38f ? 0.4999f : -1);
    Sums sum = Sums::all(0);
    for (int64_t i = 0; i < count; i += kChunk, to += stride) {
      Floats code[kVectors], farthest = Floats::all(0);
      each<kVectors>([&](auto v) VLPACK_BODY {
        code[v] = Floats::load(x + i + v * kLanes) * steps;
        farthest = Floats::max(farthest, Floats::fraction(code[v]).abs());
      });
      if (!all_less(farthest, near))
        each<kVectors>([&](auto v) VLPACK_BODY { code[v] = Floats::load(x + i + v * kLanes) / divisor / step; });
      each<kVectors>([&](auto v) VLPACK_BODY {
        const Sums whole = codes_of(code[v]);
        sum = sum + whole;
        store_codes(whole, to + v * kLanes);
      });
    }
    return sum.total();
  }

  // Quantizes a block, which begins at column `first` of x, to whole steps of peak / 127, and returns the sum of its
  // codes. If the peak is 0, infinite or NaN, so is the step, and the codes are arbitrary.
  static int32_t quantize_block(const float* x, int64_t first, int64_t count, float peak, char* to, int64_t stride) {
    const float inverse = 127 / peak;
    const Floats steps = Floats::all(inverse < 3e38f ? inverse : 0);
    Sums sum = Sums::all(0);
    for (int64_t i = first; i < first + count; i += kLanes) {
      const Sums whole = codes_of(Floats::load(x + i) * steps);
      sum = sum + whole;
      store_codes(whole, to + i / kChunk * stride + i % kChunk);
    }
    return sum.total();
  }

  static constexpr float kStep = static_cast<float>(1.0 / 127);

  static int64_t task_panels(const Linear8& l) { return l.count <= kFew ? kFewPanels : kPanels; }
  static int64_t tasks(const Linear8& l) { return (panels(l) + task_panels(l) - 1) / task_panels(l); }

  static void run(const Linear8& l, const void* room, int64_t task) {
    return l.block ? run_kind<true>(l, static_cast<const char*>(room), task)
                   : run_kind<false>(l, static_cast<const char*>(room), task);
  }

  using Tile = void (*)(const Linear8&, const char* room, int64_t row, int64_t panel);

  // The functions for 1, 2, … rows.
  template <int Panels, bool kBlocks, int... Rows>
  static constexpr std::array<Tile, sizeof...(Rows)> tiles_of(std::integer_sequence<int, Rows...>) {
    return {&product<Rows + 1, Panels, kBlocks>...};
  }

  template <bool kBlocks>
  static void run_kind(const Linear8& l, const char* room, int64_t task) {
    if (l.count <= kFew) {
      static constexpr auto tiles = tiles_of<1, kBlocks>(std::make_integer_sequence<int, kFew>());
      const Tile run = tiles[l.count - 1];
      const int64_t last = std::min(panels(l), (task + 1) * kFewPanels);
      for (int64_t panel = task * kFewPanels; panel < last; ++panel) run(l, room, 0, panel);
      return;
    }
    using Rows = std::make_integer_sequence<int, kTile>;
    static constexpr std::array<Tile, kTile> tiles[3] = {
        tiles_of<1, kBlocks>(Rows()), tiles_of<2, kBlocks>(Rows()), tiles_of<kPanels, kBlocks>(Rows())};
    const int64_t panel = task * kPanels, size = std::min<int64_t>(kPanels, panels(l) - panel);
    for (int64_t row = 0; row < l.count; row += kTile)
      tiles[size - 1][std::min<int64_t>(kTile, l.count - row) - 1](l, room, row, panel);
  }

  // The product of `Rows` rows of x, from `row` on, and `Panels` panels of the matrix, from `panel` on.
  template <int Rows, int Panels, bool kBlocks>
  static void product(const Linear8& l, const char* room, int64_t row, int64_t panel) {
    constexpr int kCount = Rows * Panels;  // sum i is that of row i / Panels and panel i % Panels
    constexpr int kUnroll = kCount == 1 ? 4 : kCount <= 6 ? 2 : 1;  // steps with sums of their own, as adding takes long
    const int64_t blocks = kBlocks ? l.blocks() : 1, stride = panel_bytes(l);
    const char* const x = room + row * width(l);
    const float* const factor = factors(l, room) + row * blocks;
    const int32_t* const offset = offsets(l, room) + row * blocks;
    const uint8_t* const codes = l.codes + (panel - l.first) * stride;
    Sums sum[kUnroll * kCount];
    Floats y[kCount];
    if (kBlocks) each<kCount>([&](auto i) VLPACK_BODY { y[i] = Floats::all(0); });
    for (int64_t block = 0; block < blocks; ++block) {
      each<kUnroll * kCount>([&](auto i) VLPACK_BODY {
        sum[i] = i < kCount ? Sums::all(offset[i / Panels * blocks + block]) : Sums::all(0);
      });
      const int64_t first = kBlocks ? block * (l.block / 4) : 0, last = kBlocks ? first + l.block / 4 : steps(l);
      for (int64_t step = first; step < last;) {
        const int64_t chunk = step / kChunkSteps, end = std::min(last, (chunk + 1) * kChunkSteps);
        const char* four = x + chunk * Rows * kChunk + step % kChunkSteps * 4;
        const auto add = [&](auto u) VLPACK_BODY {
          Bytes weight[Panels];
          each<Panels>([&](auto p) VLPACK_BODY {
            const uint8_t* const from = codes + p * stride + (step + u) * kVector;
            weight[p] = Bytes::load(from);
            if (Panels == 1) _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
          });
          each<Rows>([&](auto r) VLPACK_BODY {
            const Bytes factor = spread(four + r * kChunk + u * 4);
            each<Panels>([&](auto p) VLPACK_BODY {
              constexpr int i = u * kCount + r * Panels + p;
              sum[i] = sum[i].add_exactly(weight[p], factor);
            });
          });
        };
        if constexpr (kUnroll > 1)
          for (; step + kUnroll <= end; step += kUnroll, four += 4 * kUnroll) each<kUnroll>(add);
        for (; step < end; ++step, four += 4) add(std::integral_constant<int, 0>());
      }
      each<(kUnroll - 1) * kCount>([&](auto i) VLPACK_BODY { sum[i % kCount] = sum[i % kCount] + sum[i + kCount]; });
      if (kBlocks)
        each<kCount>([&](auto i) VLPACK_BODY {
          const Floats scale = Floats::load(l.scales + ((panel - l.first + i % Panels) * blocks + block) * kLanes);
          y[i] = Floats::fma(sum[i].floats(), scale * Floats::all(factor[i / Panels * blocks + block]), y[i]);
        });
    }
    each<Panels>([&](auto p) VLPACK_BODY {
      const int64_t column = (panel + p) * kLanes;
      const Floats scale =
          kBlocks ? Floats::all(0) : load_some(l.scales + column, l.rows - column) * Floats::all(kStep);
      each<Rows>([&](auto r) VLPACK_BODY {
        constexpr int i = r * Panels + p;
        finish(l, row + r, column, kBlocks ? y[i] : sum[i].floats() * scale * Floats::all(factor[r]));
      });
    });
  }
};

constexpr Linear8Kernels kLinear8 = {
    Multiply8::bytes, Multiply8::lay, Multiply8::scales, Multiply8::lay_scales, Multiply8::room,
    Multiply8::packs, Multiply8::pack, Multiply8::tasks, Multiply8::run,
};

}  // namespace
}  // namespace vlpack
