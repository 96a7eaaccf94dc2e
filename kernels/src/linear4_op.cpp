#include "linear4_op.h"

#include <memory>

#include "kernels.h"
#include "op.h"

namespace vlpack {
namespace {

constexpr size_t kMostDimensions = 8;

struct Linear4Op {
  static constexpr const char* kName = "Linear4";
  static constexpr size_t kInputs = 4;
  static int input_type(size_t index) { return index % 2 ? ort::kUint8 : ort::kFloat; }
  static int presence(size_t index) { return index == 3 ? ort::kOptional : ort::kRequired; }

  ort::Api api;
  int64_t cols, rows, block;

  Linear4Op(const ort::Api& api, const ort::KernelInfo* info)
      : api(api), cols(api.int_attribute(info, "K")), rows(api.int_attribute(info, "N")),
        block(api.int_attribute(info, "block_size")) {
    if (cols < 1 || rows < 1) throw ort::Error{"K and N must be positive"};
    if (block != 16 && block != 32 && block != 64 && block != 128 && block != 256)
      throw ort::Error{"block_size must be 16, 32, 64, 128 or 256"};
  }

  void run(ort::KernelContext* context) const {
    const Kernels& kernels = *best_kernels();
    Linear4 l{};
    l.rows = rows, l.cols = cols, l.block = block, l.blocks = (cols + block - 1) / block;
    int64_t sizes[kMostDimensions];
    const ort::Value* x = api.input(context, 0);
    const size_t rank = api.sizes(x, sizes, kMostDimensions);
    if (rank < 1 || sizes[rank - 1] != cols) throw ort::Error{"the last dimension of x is not K"};
    l.count = 1;
    for (size_t i = 0; i + 1 < rank; ++i) l.count *= sizes[i];
    sizes[rank - 1] = rows;
    l.codes = array<uint8_t>(context, 1, rows * l.blocks * (block / 2));
    l.scales = array<float>(context, 2, rows * l.blocks);
    l.zeros = array<uint8_t>(context, 3, rows * ((l.blocks + 1) / 2));
    l.x = static_cast<const float*>(api.data(x));
    l.y = static_cast<float*>(api.data(api.output(context, 0, sizes, rank)));
    if (l.count == 0) return;
    const std::unique_ptr<char[]> room(new char[kernels.linear4_room(l)]);
    ort::parallel_for(api, context, kernels.linear4_packs(l),
                      [&](int64_t task) { kernels.linear4_pack(l, room.get(), task); });
    ort::parallel_for(api, context, kernels.linear4_tasks(l),
                      [&](int64_t task) { kernels.linear4_run(l, room.get(), task); });
  }

  // The data of an input that has `count` values; null if it is optional and not given.
  template <class Value>
  const Value* array(const ort::KernelContext* context, size_t index, int64_t count) const {
    const ort::Value* value = index < api.input_count(context) ? api.input(context, index) : nullptr;
    if (!value && presence(index) == ort::kOptional) return nullptr;
    int64_t sizes[kMostDimensions], found = 1;
    const size_t rank = api.sizes(value, sizes, kMostDimensions);
    for (size_t i = 0; i < rank; ++i) found *= sizes[i];
    if (found != count) throw ort::Error{"codes, scales and zeros do not have the sizes that K, N and block_size say"};
    return static_cast<const Value*>(api.data(value));
  }
};

}  // namespace

const ort::CustomOp* linear4_op() { return custom_op<Linear4Op>(); }

}  // namespace vlpack
