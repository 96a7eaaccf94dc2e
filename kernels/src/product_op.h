// The part that the operators of products share.
//
// After x and its own weights, an operator has the optional inputs rotation, bias, factor and residual. Its attributes
// `first` and `second` are the sizes of the first two outputs, if it has two or three.
#pragma once

#include "op.h"
#include "product.h"

namespace vlpack {

constexpr int64_t kSmallestCore = 32;  // a smaller matrix would not fill the registers

struct ProductOp {
  static constexpr size_t kOutputs = 3, kRequiredOutputs = 1, kShared = 4;

  ort::Api api;
  size_t rotation;  // index of the input; bias, factor and residual follow
  int64_t core = 0, widths[3];
  Activation activation;

  ProductOp(const ort::Api& api, const ort::KernelInfo* info, size_t rotation) : api(api), rotation(rotation) {
    const int64_t number = api.int_attribute(info, "activation", 0);
    if (number < 0 || number > 2) throw ort::Error{"activation must be 0, 1 (SiLU) or 2 (GELU with tanh)"};
    activation = static_cast<Activation>(number);
    const ort::Value* value = api.constant(info, rotation);
    int64_t sizes[2];
    if (value && api.sizes(value, sizes, 2) == 2 && sizes[0] == sizes[1])
      core = core_of(static_cast<const float*>(api.data(value)), sizes[0]);
  }

  // Reads the sizes of the outputs of a matrix with `rows` rows.
  void split(const ort::KernelInfo* info, int64_t rows) {
    const int64_t first = api.int_attribute(info, "first", rows);
    const int64_t second = api.int_attribute(info, "second", rows - first);
    widths[0] = first, widths[1] = second, widths[2] = rows - first - second;
    const bool aligned = first == rows || (first % 16 == 0 && (widths[2] == 0 || second % 16 == 0));
    if (!aligned || first < 1 || second < 0 || widths[2] < 0)
      throw ort::Error{"first and second must be multiples of 16, and no larger than the product"};
  }

  // The size of the smallest matrix of which a rotation [size, size] is made by doubling: C becomes [C, C; C, -C].
  static int64_t core_of(const float* rotation, int64_t size) {
    const auto doubled = [&](int64_t half) {
      for (int64_t i = 0; i < 2 * half; ++i)
        for (int64_t j = 0; j < 2 * half; ++j) {
          const float first = rotation[i % half * size + j % half];
          if (rotation[i * size + j] != (i >= half && j >= half ? -first : first)) return false;
        }
      return true;
    };
    int64_t found = size;
    while (found % kSmallestCore == 0 && found / 2 >= kSmallestCore && doubled(found / 2)) found /= 2;
    return found;
  }

  const ort::Value* constant(const ort::KernelInfo* info, size_t index) const {
    const ort::Value* value = api.constant(info, index);
    if (!value) throw ort::Error{"codes and scales must be initializers of the graph"};
    return value;
  }

  // The value of an optional input; null if it is not given.
  const ort::Value* optional(const ort::KernelContext* context, size_t index) const {
    return api.input_count(context) > index ? api.input(context, index) : nullptr;
  }

  // Sets everything but the matrix, whose sizes are set before, and makes the outputs.
  void fill(ort::KernelContext* context, Product& p) const {
    Rows rows(api, context, p.cols);
    p.x = rows.x, p.count = rows.count, p.activation = activation;
    int64_t end = 0;
    for (size_t i = 0; i < kOutputs; end += widths[i++])
      p.parts[i] = {widths[i] ? rows.output(i, widths[i]) : nullptr, end, end + widths[i]};
    if (const ort::Value* value = optional(context, rotation)) {
      int64_t sizes[2];
      if (api.sizes(value, sizes, 2) != 2 || sizes[0] != sizes[1] || sizes[0] < 1 || p.cols % sizes[0])
        throw ort::Error{"rotation must be a square matrix whose size divides K"};
      p.rotation = static_cast<const float*>(api.data(value)), p.group = sizes[0];
      p.core = core ? core : p.group;
    }
    const auto given = [&](size_t index, int64_t size) {
      const ort::Value* value = optional(context, rotation + index);
      return value ? array<float>(api, value, size) : nullptr;
    };
    p.bias = given(1, p.rows);
    p.factor = given(2, p.count * p.cols);
    if (p.factor && activation == Activation::kNone) throw ort::Error{"factor needs an activation"};
    p.residual = given(3, p.count * p.rows);
  }
};

}  // namespace vlpack
