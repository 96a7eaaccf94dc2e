#include "linear4_op.h"

#include <memory>

#include "kernels.h"
#include "pages.h"
#include "product_op.h"

namespace vlpack {
namespace {

struct Linear4Op : ProductOp {
  static constexpr const char* kName = "Linear4";
  static constexpr size_t kZeros = 3, kRotation = 4, kInputs = kRotation + kShared;
  static int input_type(size_t index) { return index == 1 || index == kZeros ? ort::kUint8 : ort::kFloat; }
  static int presence(size_t index) { return index >= kZeros ? ort::kOptional : ort::kRequired; }

  Linear4 matrix{};
  Pages laid;

  Linear4Op(const ort::Api& api, const ort::KernelInfo* info) : ProductOp(api, info, kRotation) {
    Linear4& l = matrix;
    l.cols = api.int_attribute(info, "K"), l.rows = api.int_attribute(info, "N");
    l.block = api.int_attribute(info, "block_size");
    if (l.cols < 1 || l.rows < 1) throw ort::Error{"K and N must be positive"};
    if (l.block != 16 && l.block != 32 && l.block != 64 && l.block != 128 && l.block != 256)
      throw ort::Error{"block_size must be 16, 32, 64, 128 or 256"};
    split(info, l.rows);
    l.blocks = (l.cols + l.block - 1) / l.block;
    const uint8_t* from = array<uint8_t>(api, constant(info, 1), l.rows * l.blocks * (l.block / 2));
    laid = Pages(best_kernels()->linear4_bytes(l));
    best_kernels()->linear4_lay(l, from, laid.data());
    not_needed(from, l.rows * l.blocks * (l.block / 2));
    l.codes = laid.data();
  }

  void run(ort::KernelContext* context) const {
    const Kernels& kernels = *best_kernels();
    Linear4 l = matrix;
    fill(context, l);
    l.scales = array<float>(api, api.input(context, 2), l.rows * l.blocks);
    const ort::Value* zeros = optional(context, kZeros);
    l.zeros = zeros ? array<uint8_t>(api, zeros, l.rows * ((l.blocks + 1) / 2)) : nullptr;
    if (l.count == 0) return;
    const std::unique_ptr<char[]> room(new char[kernels.linear4_room(l)]);
    ort::parallel_for(api, context, kernels.linear4_packs(l),
                      [&](int64_t task) { kernels.linear4_pack(l, room.get(), task); });
    ort::parallel_for(api, context, kernels.linear4_tasks(l),
                      [&](int64_t task) { kernels.linear4_run(l, room.get(), task); });
  }
};

}  // namespace

const ort::CustomOp* linear4_op() { return custom_op<Linear4Op>(); }

}  // namespace vlpack
