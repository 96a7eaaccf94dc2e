// The rows of a product before they are quantized and after they were multiplied, for the instruction set that the
// including file is compiled for.
#pragma once

#include <algorithm>
#include <cstring>

#include "activate.h"
#include "bytes.h"
#include "product.h"
#include "rotate.h"
#include "scratch.h"

namespace vlpack {
namespace {

// f(x) · factor, where factor may be null for 1; room for a vector more is needed.
template <class Function>
VLPACK_INLINE void activate(const float* x, const float* factor, int64_t count, float* to, const Function& f) {
  for (int64_t i = 0; i < count; i += Floats::kLanes) {
    const Floats y = f(load_some(x + i, count - i));
    (factor ? y * load_some(factor + i, count - i) : y).store(to + i);
  }
}

// A row of x after the activation and the rotation, followed by zeros up to `size` values.
inline const float* prepared(const Product& p, int64_t row, int64_t size) {
  const float* x = p.x + row * p.cols;
  float* const start = scratch<float, 10>(p.cols + Floats::kLanes);
  if (p.activation != Activation::kNone) {
    const float* const factor = p.factor ? p.factor + row * p.cols : nullptr;
    if (p.activation == Activation::kSilu)
      activate(x, factor, p.cols, start, [](Floats v) VLPACK_BODY { return silu(v); });
    else
      activate(x, factor, p.cols, start, [](Floats v) VLPACK_BODY { return gelu_tanh(v); });
    x = start;
  }
  if (!p.rotation && size == p.cols) return x;
  float* const values = scratch<float, 8>(size);
  if (p.rotation && p.core < p.group) {
    add_halves(x, p.cols, p.group, p.core, start);
    x = start;
  }
  if (p.rotation)
    rotate(x, p.cols, p.rotation, p.group, p.core, values);
  else
    std::memcpy(values, x, p.cols * sizeof(float));
  std::fill(values + p.cols, values + size, 0.0f);
  return values;
}

// Stores the products of a row of x and up to kLanes rows of the matrix, from `column`, a multiple of kLanes, on.
VLPACK_INLINE void finish(const Product& p, int64_t row, int64_t column, Floats value) {
  const Product::Part& part = p.part_of(column);
  const int64_t left = part.end - column;
  if (p.bias) value = value + load_some(p.bias + column, left);
  if (p.residual) value = value + load_some(p.residual + row * p.rows + column, left);
  store_some(value, part.y + row * (part.end - part.begin) + column - part.begin, left);
}

// Stores a single product.
VLPACK_INLINE void finish(const Product& p, int64_t row, int64_t column, float value) {
  const Product::Part& part = p.part_of(column);
  if (p.bias) value += p.bias[column];
  if (p.residual) value += p.residual[row * p.rows + column];
  part.y[row * (part.end - part.begin) + column - part.begin] = value;
}

}  // namespace
}  // namespace vlpack
