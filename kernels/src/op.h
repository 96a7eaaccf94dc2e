// The part that all custom operators share: `custom_op<Op>()` makes an operator for onnxruntime from a class `Op` with
//   static const char* kName; static constexpr size_t kInputs, kOutputs; static int input_type(size_t);
//   static int presence(size_t); Op(const ort::Api&, const ort::KernelInfo*); void run(ort::KernelContext*) const;
// Outputs are fp32.
#pragma once

#include <exception>

#include "ort_api.h"

namespace vlpack {

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
    made.output_type = [](const CustomOp*, size_t) { return int{kFloat}; };
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
