// The part that all custom operators share: `custom_op<Op>()` makes an operator for onnxruntime from a class `Op` with
//   static const char* kName; static constexpr size_t kInputs, kOutputs; static int input_type(size_t);
//   static int presence(size_t); Op(const ort::Api&, const ort::KernelInfo*); void run(ort::KernelContext*) const;
// Outputs are fp32, unless there is a `static int output_type(size_t)`, and all are required, unless there is a
// `static constexpr size_t kRequiredOutputs`.
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
  if (found != count) throw ort::Error{"an input does not have the size that the attributes and the other inputs say"};
  return static_cast<const Element*>(api.data(value));
}

// The rows x [.., cols] of a product, and its outputs.
struct Rows {
  int64_t count = 1;
  const float* x;

  Rows(const ort::Api& api, ort::KernelContext* context, int64_t cols) : api_(api), context_(context) {
    const ort::Value* value = api.input(context, 0);
    rank_ = api.sizes(value, sizes_, kMostDimensions);
    if (rank_ < 1 || sizes_[rank_ - 1] != cols) throw ort::Error{"the last dimension of x is not K"};
    for (size_t i = 0; i + 1 < rank_; ++i) count *= sizes_[i];
    x = static_cast<const float*>(api.data(value));
  }

  // The data of an output [.., size].
  float* output(size_t index, int64_t size) {
    sizes_[rank_ - 1] = size;
    return static_cast<float*>(api_.data(api_.output(context_, index, sizes_, rank_)));
  }

 private:
  const ort::Api& api_;
  ort::KernelContext* context_;
  int64_t sizes_[kMostDimensions];
  size_t rank_;
};

template <class Op>
auto output_type(size_t index, int) -> decltype(Op::output_type(index)) {
  return Op::output_type(index);
}
template <class Op>
int output_type(size_t, long) {
  return ort::kFloat;
}

// The number of outputs that every node has.
template <class Op>
auto required_outputs(int) -> decltype(Op::kRequiredOutputs) {
  return Op::kRequiredOutputs;
}
template <class Op>
size_t required_outputs(long) {
  return Op::kOutputs;
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
    made.output_presence = [](const CustomOp*, size_t index) {
      return index < required_outputs<Op>(0) ? int{kRequired} : int{kOptional};
    };
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
