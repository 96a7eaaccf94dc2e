// Products by 4-bit matrices and many rows, for the instruction set that the including file is compiled for.
//
// A task turns some panels of the matrix into panels of an 8-bit matrix and multiplies by these. If blocks have less than
// 128 columns, it rounds the matrix to 8 bits with a scale for each wide block: a step is 1/120 of the largest number
// that a wide block can have, and small beside the steps of 4 bits. Rows of x are quantized in wide blocks then, too.
#pragma once

#include "linear4_layout.h"
#include "linear8_kernel.h"

namespace vlpack {
namespace {

// The number of columns of a wide block. (256 are 4% faster, but bring the KL divergence up by as much as 2%.)
constexpr int64_t wide_block(int64_t block) { return block < 128 ? 128 : block; }

// The largest magnitude of a code. It is a multiple of 8, 10, 12 and 15, which the largest difference from a zero point
// often is, so that the codes of the block with the largest numbers are exact: with 127, ties would be common.
constexpr float kSteps = 120;

// Ratios of scales have steps of 2⁻¹⁰ and codes steps of 2⁻⁵, so the upper half of a product, rounded, is an 8-bit code.
constexpr float kRatio = 1024, kCode = 32;

struct Many {
  static constexpr int kLanes = kLanes4;

  static Linear8 wide(const Linear4& l) { return in_8_bits(l, wide_block(l.block)); }

  static int64_t room(const Linear4& l) { return Multiply8::room(wide(l)); }
  static int64_t packs(const Linear4& l) { return Multiply8::packs(wide(l)); }
  static void pack(const Linear4& l, void* room, int64_t task) { Multiply8::pack(wide(l), room, task); }
  static int64_t tasks(const Linear4& l) { return Multiply8::tasks(wide(l)); }

  static void run(const Linear4& l, const void* room, int64_t task) {
    Linear8 w = wide(l);
    const int64_t panels = Multiply8::task_panels(w), bytes = Multiply8::panel_bytes(w);
    uint8_t* const start = scratch<uint8_t, 2>(panels * bytes + 64);
    uint8_t* const codes = start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64;
    float* const scales = scratch<float, 3>(panels * w.blocks() * kLanes);
    w.first = task * panels, w.codes = codes, w.scales = scales;
    const int64_t last = std::min(Multiply8::panels(w), w.first + panels);
    for (int64_t panel = w.first; panel < last; ++panel) {
      const int64_t index = panel - w.first;
      round_panel(l, panel, w, codes + index * bytes, scales + index * w.blocks() * kLanes);
    }
    Multiply8::run(w, room, task);
  }

  // Turns kLanes rows of the matrix into a panel of an 8-bit matrix w: codes [columns / 4, kLanes, 4] and scales [wide
  // blocks, kLanes]. If the blocks of w are those of l, this is exact.
  static void round_panel(const Linear4& l, int64_t panel, const Linear8& w, uint8_t* codes, float* scales) {
    const Blocks4 blocks(l, panel);
    const uint8_t* from = l.codes + panel * panel_bytes4(l);
    for (int64_t wide = 0, block = 0; wide < w.blocks(); ++wide, scales += kLanes) {
      const int64_t last = std::min(l.blocks, block + w.block / l.block);
      Floats top = Floats::all(0);  // the largest magnitude that a number can have
      for (int64_t b = block; b < last; ++b) {
        const Floats zero = blocks.zero(b);
        top = larger(top, blocks.scale(b).abs() * Floats::max(zero, Floats::all(15) - zero));
      }
      const bool exact = w.block == l.block;
      (exact ? blocks.scale(block) : top / Floats::all(kSteps)).store(scales);
      // If the numbers of the wide block are all 0, too small to be inverted, or not finite, ratios become -2³¹, whose
      // lower half is 0, and so are all codes.
      const Floats inverse = Floats::all(kSteps * kRatio) / top;
      uint8_t* const end = codes + w.block * kLanes;  // columns that do not exist keep any codes, as x is 0 there
      for (; block < last; ++block) {
        const Floats ratio = exact ? Floats::all(kRatio) : blocks.scale(block) * inverse;
        const Sums ratios = twice(integers(ratio)), zeros = twice(integers(blocks.zero(block) * Floats::all(kCode)));
        for (int64_t step = 0; step < l.block / kColumns4; ++step, from += Bytes::kCount, codes += 2 * Bytes::kCount)
          round_codes(Bytes::load(from), ratios, zeros, codes);
      }
      codes = end;
    }
  }
};

}  // namespace
}  // namespace vlpack
