// The interface of products by 8-bit matrices.
#pragma once

#include "product.h"

namespace vlpack {

// A product by an 8-bit matrix. There are two kinds:
// - block == 0: a scale for each row of W. Rows of x are quantized as a whole.
// - block > 0, a multiple of 16: a scale for each block of columns of W. Rows of x are quantized in the same blocks.
struct Linear8 : Product {
  const uint8_t* codes;  // in the layout of `lay`
  const float* scales;   // [rows]; with blocks in the layout of `lay_scales`
  int64_t block;
  int64_t first;  // index of the panel of the layout with which codes, and scales of blocks, begin

  int64_t blocks() const { return block ? (cols + block - 1) / block : 1; }
};

// The implementation for one instruction set.
struct Linear8Kernels {
  // Rearranges codes into the layout of the kernels, in `bytes` bytes: signed codes [cols, rows] of the first kind, or
  // codes [rows, blocks, block] around 128 of the second kind, whose scales [rows, blocks] are rearranged, too.
  int64_t (*bytes)(const Linear8&);
  void (*lay)(const Linear8&, const uint8_t* codes, uint8_t* to);
  int64_t (*scales)(const Linear8&);  // number of rearranged scales
  void (*lay_scales)(const Linear8&, const float* scales, float* to);

  // There are two steps, as in `Kernels`: the first quantizes rows of x, the second computes products.
  int64_t (*room)(const Linear8&);
  int64_t (*packs)(const Linear8&);
  void (*pack)(const Linear8&, void* room, int64_t task);
  int64_t (*tasks)(const Linear8&);
  void (*run)(const Linear8&, const void* room, int64_t task);
};

}  // namespace vlpack
