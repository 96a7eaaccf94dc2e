// Activation functions of feed-forward layers, for the instruction set that the including file is compiled for.
#pragma once

#include "vectors.h"

namespace vlpack {
namespace {

// 1 / (1 + exp(-x)); NaN for NaN.
VLPACK_INLINE Floats logistic(Floats x) {
  constexpr float kLog2OfE = 1.44269504f;
  const Floats zero = Floats::all(0), one = Floats::all(1);
  const Floats exponent = Floats::where_less(x, zero, x, zero - x) * Floats::all(kLog2OfE);
  const Floats power = exp2(Floats::max(Floats::all(-200), exponent));  // 0 below; the second operand if it is NaN
  const Floats positive = one / (one + power);
  return Floats::where_less(x, zero, power * positive, positive);
}

// x · sigmoid(x)
VLPACK_INLINE Floats silu(Floats x) { return x * logistic(x); }

// 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), where (1 + tanh(z)) / 2 is sigmoid(2 z)
VLPACK_INLINE Floats gelu_tanh(Floats x) {
  constexpr float kTwice = 1.59576912f;  // 2 √(2/π)
  const Floats inner = Floats::fma(x * x, Floats::all(0.044715f * kTwice), Floats::all(kTwice));
  return x * logistic(x * inner);
}

}  // namespace
}  // namespace vlpack
