#include "linear8_op.h"

#include <memory>

#include "kernels.h"
#include "op.h"
#include "pages.h"

namespace vlpack {
namespace {

constexpr int64_t kSmallestCore = 32;  // a smaller matrix would not fill the registers
constexpr int64_t kInline = 1 << 12;  // largest number of values that are quantized in the calling thread

// The part that both operators share.
struct Product8 {
  ort::Api api;
  Linear8 matrix{};
  Pages codes;

  explicit Product8(const ort::Api& api) : api(api) {}

  const ort::Value* constant(const ort::KernelInfo* info, size_t index) const {
    const ort::Value* value = api.constant(info, index);
    if (!value) throw ort::Error{"codes and scales must be initializers of the graph"};
    return value;
  }

  // Checks the sizes and copies the codes into the layout of the kernels.
  void lay(const uint8_t* from, int64_t size) {
    if (matrix.cols < 1 || matrix.rows < 1) throw ort::Error{"K and N must be positive"};
    const Linear8Kernels& kernels = best_kernels()->linear8;
    codes = Pages(kernels.bytes(matrix));
    kernels.lay(matrix, from, codes.data());
    not_needed(from, size);
    matrix.codes = codes.data();
  }

  // The size of the smallest matrix of which a rotation [size, size] is made by doubling: C becomes [C, C; C, -C].
  static int64_t core(const float* rotation, int64_t size) {
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

  // Looks at the form of a constant rotation, which need not be known.
  void look_at_rotation(const ort::KernelInfo* info) {
    const ort::Value* value = api.constant(info, 3);
    int64_t sizes[2];
    if (value && api.sizes(value, sizes, 2) == 2 && sizes[0] == sizes[1])
      matrix.core = core(static_cast<const float*>(api.data(value)), sizes[0]);
  }

  // The value of an optional input; null if it is not given.
  const ort::Value* optional(const ort::KernelContext* context, size_t index) const {
    return api.input_count(context) > index ? api.input(context, index) : nullptr;
  }

  void multiply(ort::KernelContext* context, const float* scales, const float* bias) const {
    const Linear8Kernels& kernels = best_kernels()->linear8;
    const Rows rows(api, context, matrix.cols, matrix.rows);
    Linear8 l = matrix;
    l.scales = scales, l.bias = bias, l.x = rows.x, l.y = rows.y, l.count = rows.count;
    if (const ort::Value* rotation = optional(context, 3)) {
      int64_t sizes[2];
      if (api.sizes(rotation, sizes, 2) != 2 || sizes[0] != sizes[1] || sizes[0] < 1 || l.cols % sizes[0])
        throw ort::Error{"rotation must be a square matrix whose size divides K"};
      l.rotation = static_cast<const float*>(api.data(rotation)), l.group = sizes[0];
      l.core = matrix.core ? matrix.core : l.group;
    }
    if (l.count == 0) return;
    const std::unique_ptr<char[]> room(new char[kernels.room(l)]);
    const auto pack = [&](int64_t task) { kernels.pack(l, room.get(), task); };
    if (l.count * l.cols <= kInline)
      for (int64_t task = 0; task < kernels.packs(l); ++task) pack(task);
    else
      ort::parallel_for(api, context, kernels.packs(l), pack);
    ort::parallel_for(api, context, kernels.tasks(l), [&](int64_t task) { kernels.run(l, room.get(), task); });
  }
};

struct Linear8Op : Product8 {
  static constexpr const char* kName = "Linear8";
  static constexpr size_t kInputs = 5, kOutputs = 1;
  static int input_type(size_t index) { return index == 1 ? ort::kInt8 : ort::kFloat; }
  static int presence(size_t index) { return index >= 3 ? ort::kOptional : ort::kRequired; }

  Linear8Op(const ort::Api& api, const ort::KernelInfo* info) : Product8(api) {
    const ort::Value* given = constant(info, 1);
    int64_t sizes[2];
    if (api.sizes(given, sizes, 2) != 2) throw ort::Error{"codes must have two dimensions"};
    matrix.cols = sizes[0], matrix.rows = sizes[1];
    lay(static_cast<const uint8_t*>(api.data(given)), matrix.rows * matrix.cols);
    look_at_rotation(info);
  }

  void run(ort::KernelContext* context) const {
    const float* all = array<float>(api, api.input(context, 2), matrix.rows);
    const ort::Value* bias = optional(context, 4);
    multiply(context, all, bias ? array<float>(api, bias, matrix.rows) : nullptr);
  }
};

struct Linear8BlocksOp : Product8 {
  Pages laid_scales;

  static constexpr const char* kName = "Linear8Blocks";
  static constexpr size_t kInputs = 4, kOutputs = 1;
  static int input_type(size_t index) { return index == 1 ? ort::kUint8 : ort::kFloat; }
  static int presence(size_t index) { return index == 3 ? ort::kOptional : ort::kRequired; }

  Linear8BlocksOp(const ort::Api& api, const ort::KernelInfo* info) : Product8(api) {
    matrix.cols = api.int_attribute(info, "K"), matrix.rows = api.int_attribute(info, "N");
    matrix.block = api.int_attribute(info, "block_size");
    if (matrix.block < 16 || matrix.block % 16) throw ort::Error{"block_size must be a multiple of 16"};
    const int64_t blocks = matrix.rows * matrix.blocks(), size = blocks * matrix.block;
    const uint8_t* given = array<uint8_t>(api, constant(info, 1), size);
    const float* all = array<float>(api, constant(info, 2), blocks);
    lay(given, size);
    look_at_rotation(info);
    laid_scales = Pages(best_kernels()->linear8.scales(matrix) * sizeof(float));
    float* const laid = reinterpret_cast<float*>(laid_scales.data());
    best_kernels()->linear8.lay_scales(matrix, all, laid);
    not_needed(all, blocks * sizeof(float));
    matrix.scales = laid;
  }

  void run(ort::KernelContext* context) const {
    multiply(context, matrix.scales, nullptr);
  }
};

}  // namespace

const ort::CustomOp* linear8_op() { return custom_op<Linear8Op>(); }
const ort::CustomOp* linear8_blocks_op() { return custom_op<Linear8BlocksOp>(); }

}  // namespace vlpack
