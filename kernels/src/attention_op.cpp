#include "attention_op.h"

#include <cmath>
#include <memory>

#include "kernels.h"
#include "op.h"

namespace vlpack {
namespace {

struct AttentionOp {
  static constexpr const char* kName = "Attention";
  static constexpr size_t kInputs = 3, kOutputs = 1;
  static int input_type(size_t) { return ort::kFloat; }
  static int presence(size_t) { return ort::kRequired; }

  ort::Api api;
  int64_t heads;
  float scale;

  AttentionOp(const ort::Api& api, const ort::KernelInfo* info)
      : api(api), heads(api.int_attribute(info, "num_heads")), scale(api.float_attribute(info, "scale")) {
    if (heads < 1) throw ort::Error{"num_heads must be positive"};
  }

  void run(ort::KernelContext* context) const {
    const Kernels& kernels = *best_kernels();
    int64_t sizes[3][3];
    const float* data[3];
    for (size_t i = 0; i < 3; ++i) {
      const ort::Value* value = api.input(context, i);
      if (api.sizes(value, sizes[i], 3) != 3) throw ort::Error{"q, k and v must have three dimensions"};
      data[i] = static_cast<const float*>(api.data(value));
    }
    const int64_t batch = sizes[0][0], queries = sizes[0][1], width = sizes[0][2], keys = sizes[1][1];
    for (size_t i = 1; i < 3; ++i)
      if (sizes[i][0] != batch || sizes[i][1] != keys || sizes[i][2] != width)
        throw ort::Error{"q, k and v must have the same batch and width, and k and v the same length"};
    if (width % heads) throw ort::Error{"the width is not a multiple of num_heads"};

    float* out = static_cast<float*>(api.data(api.output(context, 0, sizes[0], 3)));
    if (batch * queries * width == 0) return;
    Attention a{};
    a.q = data[0], a.k = data[1], a.v = data[2], a.out = out;
    a.batch = batch, a.heads = heads, a.group = 1, a.queries = queries, a.keys = a.visible = keys, a.size = width / heads;
    a.q_row = a.k_row = width, a.q_head = a.k_head = a.size;
    a.q_batch = queries * width, a.k_batch = keys * width;
    a.scale = scale > 0 ? scale : 1 / std::sqrt(static_cast<float>(a.size));
    const std::unique_ptr<char[]> room(new char[kernels.attention_room(a)]);
    ort::parallel_for(api, context, kernels.attention_packs(a),
                      [&](int64_t task) { kernels.attention_pack(a, room.get(), task); });
    ort::parallel_for(api, context, kernels.attention_tasks(a),
                      [&](int64_t task) { kernels.attention_run(a, room.get(), task); });
  }
};

}  // namespace

const ort::CustomOp* attention_op() { return custom_op<AttentionOp>(); }

}  // namespace vlpack
