#include "linear4_op.h"

#include <memory>

#include "kernels.h"
#include "pages.h"
#include "op.h"

namespace vlpack {
namespace {

struct Linear4Op {
  static constexpr const char* kName = "Linear4";
  static constexpr size_t kInputs = 4, kOutputs = 1;
  static int input_type(size_t index) { return index % 2 ? ort::kUint8 : ort::kFloat; }
  static int presence(size_t index) { return index == 3 ? ort::kOptional : ort::kRequired; }

  ort::Api api;
  int64_t cols, rows, block;
  Pages laid;

  Linear4Op(const ort::Api& api, const ort::KernelInfo* info)
      : api(api), cols(api.int_attribute(info, "K")), rows(api.int_attribute(info, "N")),
        block(api.int_attribute(info, "block_size")) {
    if (cols < 1 || rows < 1) throw ort::Error{"K and N must be positive"};
    if (block != 16 && block != 32 && block != 64 && block != 128 && block != 256)
      throw ort::Error{"block_size must be 16, 32, 64, 128 or 256"};
    const ort::Value* codes = api.constant(info, 1);
    if (!codes) throw ort::Error{"codes must be an initializer of the graph"};
    const Linear4 l = matrix();
    const uint8_t* from = array<uint8_t>(api, codes, rows * l.blocks * (block / 2));
    laid = Pages(best_kernels()->linear4_bytes(l));
    best_kernels()->linear4_lay(l, from, laid.data());
    not_needed(from, rows * l.blocks * (block / 2));
  }

  Linear4 matrix() const {
    Linear4 l{};
    l.codes = laid.data(), l.rows = rows, l.cols = cols, l.block = block, l.blocks = (cols + block - 1) / block;
    return l;
  }

  void run(ort::KernelContext* context) const {
    const Kernels& kernels = *best_kernels();
    Linear4 l = matrix();
    Rows rows_of(api, context, cols);
    l.count = rows_of.count, l.x = rows_of.x, l.y = rows_of.output(0, rows);
    l.scales = array<float>(api, api.input(context, 2), rows * l.blocks);
    const ort::Value* zeros = api.input_count(context) > 3 ? api.input(context, 3) : nullptr;
    l.zeros = zeros ? array<uint8_t>(api, zeros, rows * ((l.blocks + 1) / 2)) : nullptr;
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
