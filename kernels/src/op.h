// The part that all custom operators share: `custom_op<Op>()` makes an operator for onnxruntime from a class `Op` with
//   static const char* kName; static constexpr size_t kInputs, kOutputs; static int input_type(size_t);
//   static int presence(size_t); Op(const ort::Api&, const ort::KernelInfo*); void run(ort::KernelContext*) const;
// Outputs are fp32, unless there is a `static int output_type(size_t)`.
#pragma once

#include <exception>

#include "ort_api.h"

namespace vlpack {

// The largest number of dimensions of an operator's tensors.
constexpr size_t kMostDimensions = 8;

// The data of a tensor, after a check that it has `count` values.
template <class Element>
const Element* array(const ort::Api& api, const ort::Value* value, int64_t count) {
  int64_t sizes[kMostDimensions], found = 1;
  const size_t rank = api.sizes(value, sizes, kMostDimensions);
  for (size_t i = 0; i < rank; ++i) found *= sizes[i];
  if (found != count) throw ort::Error{"codes, scales, zeros and bias do not have the sizes that the attributes say"};
  return static_cast<const Element*>(api.data(value));
}

// The rows x [.., cols] and y [.., rows] of a product.
struct Rows {
  int64_t count;
  const float* x;
  float* y;

  Rows(const ort::Api& api, ort::KernelContext* context, int64_t cols, int64_t rows) : count(1) {
    int64_t sizes[kMostDimensions];
    const ort::Value* value = api.input(context, 0);
    const size_t rank = api.sizes(value, sizes, kMostDimensions);
    if (rank < 1 || sizes[rank - 1] != cols) throw ort::Error{"the last dimension of x is not K"};
    for (size_t i = 0; i + 1 < rank; ++i) count *= sizes[i];
    sizes[rank - 1] = rows;
    x = static_cast<const float*>(api.data(value));
    y = static_cast<float*>(api.data(api.output(context, 0, sizes, rank)));
  }
};

template <class Op>
auto output_type(size_t index, int) -> decltype(Op::output_type(index)) {
  return Op::output_type(index);
}
template <class Op>
int output_type(size_t, long) {
  return ort::kFloat;
}

template <class Op>
const ort::CustomOp* custom_op() {
  using namespace ort;
  static const CustomOp op = [] {
    CustomOp made;
    made.name = [](const CustomOp*) { return Op::kName; };
    made.provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
    made.input_count = [](const CustomOp*) { return Op::kInputs; };
    made.input_type = [](const CustomOp*, size_t index) { return Op::input_type(index); };
    made.input_presence = [](const CustomOp*, size_t index) { return Op::presence(index); };
    made.input_memory = [](const CustomOp*, size_t) { return 0; };
    made.output_count = [](const CustomOp*) { return Op::kOutputs; };
    made.output_type = [](const CustomOp*, size_t index) { return output_type<Op>(index, 0); };
    made.output_presence = [](const CustomOp*, size_t) { return int{kRequired}; };
    made.variadic_input_least = made.variadic_output_least = [](const CustomOp*) { return 0; };
    made.variadic_input_equal = made.variadic_output_equal = [](const CustomOp*) { return 1; };
    made.start_version = [](const CustomOp*) { return 1; };
    made.end_version = [](const CustomOp*) { return 2147483647; };
    made.create_kernel_checked = [](const CustomOp*, Table table, const KernelInfo* info, void** kernel) -> Status* {
      const Api api(table);
      try {
        *kernel = new Op(api, info);
      } catch (const Error& error) {
        return api.status(std::string(Op::kName) + ": " + error.text);
      } catch (const std::exception& error) {
        return api.status(std::string(Op::kName) + ": " + error.what());
      }
      return nullptr;
    };
    made.compute_checked = [](void* kernel, KernelContext* context) -> Status* {
      const Op& op = *static_cast<const Op*>(kernel);
      try {
        op.run(context);
      } catch (const Error& error) {
        return op.api.status(std::string(Op::kName) + ": " + error.text);
      } catch (const std::exception& error) {
        return op.api.status(std::string(Op::kName) + ": " + error.what());
      }
      return nullptr;
    };
    made.destroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
    return made;
  }();
  return &op;
}

}  // namespace vlpack
