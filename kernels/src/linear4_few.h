// Products by 4-bit matrices and few rows, for the instruction set that the including file is compiled for.
//
// Rows of x are quantized to 8 bits with one scale for each block of the matrix, so that products within a block are
// products of integers. Codes are unpacked in registers and multiplied by the same columns of all rows of x, so the
// matrix is read once, sequentially and at the speed of memory.
#pragma once

#include "linear4_layout.h"
#include "linear8_kernel.h"

namespace vlpack {
namespace {

struct Few {
  static constexpr int kLanes = kLanes4;
  static constexpr int kMost = kLanes == 16 ? 16 : 4;  // largest number of rows of x
  static constexpr int kTaskPanels = 64 / kLanes;
  static constexpr int64_t kAhead = 8192;  // bytes of the matrix that are fetched in advance

  // The quantized rows of x are those of an 8-bit matrix with the same blocks.
  static Linear8 same(const Linear4& l) { return in_8_bits(l, l.block); }

  static int64_t room(const Linear4& l) { return Multiply8::room(same(l)); }
  static int64_t packs(const Linear4& l) { return l.count; }
  static void pack(const Linear4& l, void* room, int64_t row) { Multiply8::pack(same(l), room, row); }
  static int64_t tasks(const Linear4& l) { return (panels4(l) + kTaskPanels - 1) / kTaskPanels; }

  static void run(const Linear4& l, const void* room, int64_t task) {
    const int64_t last = std::min(panels4(l), (task + 1) * kTaskPanels);
    each<kMost>([&](auto rows) VLPACK_BODY {
      if (l.count != rows + 1) return;
      for (int64_t panel = task * kTaskPanels; panel < last; ++panel)
        product<rows + 1>(l, static_cast<const char*>(room), panel);
    });
  }

  template <int Rows>
  static void product(const Linear4& l, const char* room, int64_t panel) {
    const Linear8 w = same(l);
    const Blocks4 blocks(l, panel);
    const float* const factors = Multiply8::factors(w, room);
    const int32_t* const offsets = Multiply8::offsets(w, room);  // -128 times the sums of codes of x
    const uint8_t* codes = l.codes + panel * panel_bytes4(l);
    const int64_t steps = l.block / kColumns4;
    constexpr int kChunkSteps = Multiply8::kChunk / kColumns4;
    constexpr int kSums = Rows <= 2 ? 4 : Rows <= 6 ? 2 : 1;  // of a row and block, as adding takes long
    constexpr int kUnroll = 2;                                // a block has an even number of steps
    Floats y[Rows];
    each<Rows>([&](auto r) VLPACK_BODY { y[r] = Floats::all(0); });
    // the scales of the next panel, of which a line of the cache is fetched with each block
    const float* const next = l.scales + (panel + 1) * kLanes * l.blocks;
    for (int64_t block = 0; block < l.blocks; ++block) {
      _mm_prefetch(reinterpret_cast<const char*>(next + block * kLanes), _MM_HINT_T0);
      Sums sum[Rows * kSums];
      each<Rows * kSums>([&](auto i) VLPACK_BODY { sum[i] = Sums::all(0); });
      for (int64_t step = block * steps; step < (block + 1) * steps; step += kUnroll)
        each<kUnroll>([&](auto u) VLPACK_BODY {
          // a chunk of x has the codes of all rows, one after the other
          const int64_t chunk = (step + u) / kChunkSteps * Rows * Multiply8::kChunk;
          const char* const x = room + chunk + (step + u) % kChunkSteps * kColumns4;
          _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
          const Bytes packed = Bytes::load(codes), low = packed.low(), high = packed.high();
          codes += Bytes::kCount;
          each<Rows>([&](auto r) VLPACK_BODY {
            Sums& first = sum[r * kSums + 2 * u % kSums];
            Sums& second = sum[r * kSums + (2 * u + 1) % kSums];
            first = first.add(low, spread(x + r * Multiply8::kChunk));
            second = second.add(high, spread(x + r * Multiply8::kChunk + 4));
          });
        });
      const Floats scale = blocks.scale(block), zero = blocks.zero(block) * Floats::all(1.0f / 128);
      each<Rows>([&](auto r) VLPACK_BODY {
        const Floats offset = Floats::all(static_cast<float>(offsets[r * l.blocks + block]));
        Sums total = sum[r * kSums];
        each<kSums - 1>([&](auto i) VLPACK_BODY { total = total + sum[r * kSums + i + 1]; });
        const Floats product = Floats::fma(zero, offset, total.floats());
        y[r] = Floats::fma(product, scale * Floats::all(factors[r * l.blocks + block]), y[r]);
      });
    }
    each<Rows>([&](auto r) VLPACK_BODY { finish(l, r, panel * kLanes, y[r]); });
  }
};

}  // namespace
}  // namespace vlpack
