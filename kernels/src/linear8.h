// The interface of products by 8-bit matrices.
#pragma once

#include <cstdint>

namespace vlpack {

// The product y = x Wᵀ + bias of fp32 rows x [count, cols] and an 8-bit matrix W [rows, cols]. There are two kinds:
// - block == 0: a scale for each row of W. Rows of x are quantized as a whole.
// - block > 0, a multiple of 16: a scale for each block of columns of W. Rows of x are quantized in the same blocks.
// Before x is quantized, each group of `group` columns, a divisor of cols, is multiplied by the matrix `rotation`.
struct Linear8 {
  const uint8_t* codes;   // in the layout of `lay`
  const float* scales;    // [rows]; with blocks in the layout of `lay_scales`
  const float* bias;      // [rows], or null
  const float* rotation;  // [group, group], or null
  int64_t rows, cols, block, group;
  int64_t core;  // rotation is the Kronecker product of Sylvester's Hadamard matrix and its first part [core, core]
  const float* x;
  float* y;
  int64_t count;

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
