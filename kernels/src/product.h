// What products by 8-bit and by 4-bit matrices have in common.
#pragma once

#include <cstdint>

namespace vlpack {

// The function that is applied to x first; the values are those of the operators' attribute `activation`.
enum class Activation : int64_t { kNone = 0, kSilu = 1, kGeluTanh = 2 };

// The product y = f(x) Wᵀ + bias + residual of fp32 rows x [count, cols] and a matrix W [rows, cols]. f is an activation,
// perhaps a product with `factor`, and then a rotation: each group of `group` columns, a divisor of cols, is multiplied
// by a matrix. Adjacent columns of y can be separate outputs.
struct Product {
  struct Part {
    float* y;            // [count, end - begin]
    int64_t begin, end;  // the columns of y; all parts but the last end at multiples of 16
  };

  int64_t rows, cols;
  Activation activation;
  const float* factor;    // [count, cols], or null
  const float* rotation;  // [group, group], or null
  int64_t group;
  int64_t core;  // rotation is the Kronecker product of Sylvester's Hadamard matrix and its first part [core, core]
  const float* bias;      // [rows], or null
  const float* residual;  // [count, rows], or null
  const float* x;
  Part parts[3];  // in the order of columns; an unused one ends where it begins
  int64_t count;

  const Part& part_of(int64_t column) const {
    return parts[column < parts[0].end ? 0 : column < parts[1].end ? 1 : 2];
  }
};

}  // namespace vlpack
