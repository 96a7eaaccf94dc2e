// Products of neighbouring values and a small matrix, for the instruction set that the including file is compiled for.
#pragma once

#include <type_traits>

#include "bytes.h"
#include "unroll.h"

namespace vlpack {
namespace {

// Multiplies kGroups groups of x by the columns of a matrix from `column` on, in kVectors vectors. Products are added
// in the order of the rows of the matrix, as onnxruntime's MatMul does it, so the bits of the results are the same.
template <int kGroups, int kVectors>
VLPACK_INLINE void rotate_groups(
    const float* x, const float* matrix, int64_t stride, int64_t size, int64_t column, float* to) {
  constexpr int kLanes = Floats::kLanes;
  Floats sum[kGroups * kVectors];
  each<kGroups * kVectors>([&](auto i) VLPACK_BODY { sum[i] = Floats::all(0); });
  const auto left = [&](int vector) { return size - column - vector * kLanes; };
  for (int64_t row = 0; row < size; ++row) {
    Floats factor[kVectors];
    each<kVectors>([&](auto v) VLPACK_BODY {
      const float* const from = matrix + row * stride + column + v * kLanes;
      factor[v] = kVectors > 1 ? Floats::load(from) : load_some(from, left(v));
    });
    each<kGroups>([&](auto g) VLPACK_BODY {
      const Floats value = Floats::all(x[g * size + row]);
      each<kVectors>([&](auto v) VLPACK_BODY {
        sum[g * kVectors + v] = Floats::fma(value, factor[v], sum[g * kVectors + v]);
      });
    });
  }
  each<kGroups>([&](auto g) VLPACK_BODY {
    each<kVectors>([&](auto v) VLPACK_BODY {
      float* const place = to + g * size + column + v * kLanes;
      if (kVectors > 1) return sum[g * kVectors + v].store(place);
      store_some(sum[g * kVectors + v], place, left(v));
    });
  });
}

// Multiplies each group of `size` of the `count` values x by a matrix [size, size] whose rows are `stride` floats apart.
inline void rotate(const float* x, int64_t count, const float* matrix, int64_t stride, int64_t size, float* to) {
  constexpr int kLanes = Floats::kLanes, kSums = kLanes == 16 ? 24 : 8;
  const int64_t groups = count / size;
  int64_t column = 0;
  const auto columns = [&](auto vectors) VLPACK_BODY {
    constexpr int kVectors = vectors, kGroups = kSums / kVectors;
    for (; column + kVectors * kLanes <= size; column += kVectors * kLanes) {
      int64_t g = 0;
      for (; g + kGroups <= groups; g += kGroups)
        rotate_groups<kGroups, kVectors>(x + g * size, matrix, stride, size, column, to + g * size);
      for (; g < groups; ++g) rotate_groups<1, kVectors>(x + g * size, matrix, stride, size, column, to + g * size);
    }
  };
  columns(std::integral_constant<int, 4>());
  columns(std::integral_constant<int, 2>());
  for (; column < size; column += kLanes)
    for (int64_t g = 0; g < groups; ++g)
      rotate_groups<1, 1>(x + g * size, matrix, stride, size, column, to + g * size);
}

// Multiplies each group of `size` of the `count` values x by the Kronecker product of Sylvester's Hadamard matrix and the
// identity of `core`, a multiple of kLanes: in each step, the halves of a group become their sum and their difference.
inline void add_halves(const float* x, int64_t count, int64_t size, int64_t core, float* to) {
  for (; size > core; size /= 2, x = to)
    for (int64_t start = 0; start < count; start += size)
      for (int64_t i = start; i < start + size / 2; i += Floats::kLanes) {
        const Floats a = Floats::load(x + i), b = Floats::load(x + i + size / 2);
        (a + b).store(to + i);
        (a - b).store(to + i + size / 2);
      }
}

}  // namespace
}  // namespace vlpack
