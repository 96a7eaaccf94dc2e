// The interface of products by 8-bit matrices.
#pragma once

#include <cstdint>

namespace vlpack {

// The function that is applied to x first; the values are those of the operators' attribute `activation`.
enum class Activation : int64_t { kNone = 0, kSilu = 1, kGeluTanh = 2 };

// The product y = x Wᵀ + bias + residual of fp32 rows x [count, cols] and an 8-bit matrix W [rows, cols]. There are two kinds:
// - block == 0: a scale for each row of W. Rows of x are quantized as a whole.
// - block > 0, a multiple of 16: a scale for each block of columns of W. Rows of x are quantized in the same blocks.
// Before x is quantized, `activation` is applied, and then each group of `group` columns, a divisor of cols, is
// multiplied by the matrix `rotation`. Adjacent columns of y can be separate outputs.
struct Linear8 {
  struct Part {
    float* y;             // [count, end - begin]
    int64_t begin, end;  // the columns of y; all parts but the last begin and end at multiples of 16
  };

  const uint8_t* codes;   // in the layout of `lay`
  const float* scales;    // [rows]; with blocks in the layout of `lay_scales`
  const float* bias;      // [rows], or null
  const float* rotation;  // [group, group], or null
  int64_t rows, cols, block, group;
  int64_t core;  // rotation is the Kronecker product of Sylvester's Hadamard matrix and its first part [core, core]
  Activation activation;
  const float* factor;  // [count, cols], which the activated x is multiplied by; or null
  const float* residual;  // [count, rows], or null
  const float* x;
  Part parts[3];  // in the order of columns; an unused one ends where it begins
  int64_t count;

  const Part& part_of(int64_t column) const {
    return parts[column < parts[0].end ? 0 : column < parts[1].end ? 1 : 2];
  }
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
