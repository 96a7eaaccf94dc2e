// The entry points of the library.
#include "attention_op.h"
#include "causal_attention_op.h"
#include "kernels.h"
#include "linear4_op.h"
#include "linear8_op.h"
#include "ort_api.h"

namespace {

// The number of the interface of the operators: their names, inputs, outputs and attributes. Every change of these
// raises it, here and in vlpack.ort.kernels.
constexpr int kInterface = 2;

}  // namespace

// Returns the number of the interface, which must be that of the vlpack that uses the library.
VLPACK_EXPORT int VlpackKernelsInterface() { return kInterface; }

// Returns the name of the instruction set in use; null if there are no kernels for this processor.
VLPACK_EXPORT const char* VlpackKernelsInstructionSet() {
  const vlpack::Kernels* kernels = vlpack::best_kernels();
  return kernels ? kernels->name : nullptr;
}

// Adds the domain `vlpack` with all operators to the options of a session; called by register_custom_ops_library.
VLPACK_EXPORT ort::Status* VLPACK_CALL RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  ort::Table table = base->get_api(ort::kVersion);
  if (!table) {
    // Every version of onnxruntime has version 1 of the table, with which the error can be reported.
    return ort::Api(base->get_api(1)).status("vlpack-kernels needs onnxruntime 1.17 or newer");
  }
  const ort::Api api(table);
  try {
    if (!vlpack::best_kernels()) throw ort::Error{"vlpack-kernels has no kernels for this processor"};
    // Sessions refer to the domain as long as they exist, so it is made once and never freed.
    static ort::Domain* const domain = [&] {
      ort::Domain* made = nullptr;
      api.create_domain("vlpack", &made);
      api.add(made, vlpack::attention_op());
      api.add(made, vlpack::linear4_op());
      api.add(made, vlpack::causal_attention_op());
      api.add(made, vlpack::narrow_causal_attention_op());
      api.add(made, vlpack::linear8_op());
      api.add(made, vlpack::linear8_blocks_op());
      return made;
    }();
    api.add(options, domain);
  } catch (const ort::Error& error) {
    return api.status(error.text);
  }
  return nullptr;
}
