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

  Product8(const ort::Api& api, const ort::KernelInfo* info) : api(api) {
    const int64_t activation = api.int_attribute(info, "activation", 0);
    if (activation < 0 || activation > 2) throw ort::Error{"activation must be 0, 1 (SiLU) or 2 (GELU with tanh)"};
    matrix.activation = static_cast<Activation>(activation);
  }

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

  // Computes outputs of `widths` columns; scales and the optional inputs after the rotation are in `l` already.
  void multiply(ort::KernelContext* context, Rows& rows, Linear8& l, const int64_t (&widths)[3]) const {
    const Linear8Kernels& kernels = best_kernels()->linear8;
    int64_t end = 0;
    for (size_t i = 0; i < 3; ++i) {
      l.parts[i] = {widths[i] ? rows.output(i, widths[i]) : nullptr, end, end + widths[i]};
      end += widths[i];
    }
    l.x = rows.x, l.count = rows.count;
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
  int64_t widths[3];

  static constexpr const char* kName = "Linear8";
  static constexpr size_t kInputs = 7, kOutputs = 3, kRequiredOutputs = 1;
  static int input_type(size_t index) { return index == 1 ? ort::kInt8 : ort::kFloat; }
  static int presence(size_t index) { return index >= 3 ? ort::kOptional : ort::kRequired; }

  Linear8Op(const ort::Api& api, const ort::KernelInfo* info) : Product8(api, info) {
    const ort::Value* given = constant(info, 1);
    int64_t sizes[2];
    if (api.sizes(given, sizes, 2) != 2) throw ort::Error{"codes must have two dimensions"};
    matrix.cols = sizes[0], matrix.rows = sizes[1];
    lay(static_cast<const uint8_t*>(api.data(given)), matrix.rows * matrix.cols);
    look_at_rotation(info);
    const int64_t first = api.int_attribute(info, "first", matrix.rows);
    const int64_t second = api.int_attribute(info, "second", matrix.rows - first);
    widths[0] = first, widths[1] = second, widths[2] = matrix.rows - first - second;
    const bool whole = first == matrix.rows || (first % 16 == 0 && (widths[2] == 0 || second % 16 == 0));
    if (!whole || first < 1 || second < 0 || widths[2] < 0)
      throw ort::Error{"first and second must be multiples of 16, and no larger than the product"};
  }

  void run(ort::KernelContext* context) const {
    Rows rows(api, context, matrix.cols);
    Linear8 l = matrix;
    l.scales = array<float>(api, api.input(context, 2), l.rows);
    if (const ort::Value* bias = optional(context, 4)) l.bias = array<float>(api, bias, l.rows);
    if (const ort::Value* factor = optional(context, 5)) l.factor = array<float>(api, factor, rows.count * l.cols);
    if (const ort::Value* residual = optional(context, 6))
      l.residual = array<float>(api, residual, rows.count * l.rows);
    multiply(context, rows, l, widths);
  }
};

struct Linear8BlocksOp : Product8 {
  Pages laid_scales;

  static constexpr const char* kName = "Linear8Blocks";
  static constexpr size_t kInputs = 5, kOutputs = 1;
  static int input_type(size_t index) { return index == 1 ? ort::kUint8 : ort::kFloat; }
  static int presence(size_t index) { return index >= 3 ? ort::kOptional : ort::kRequired; }

  Linear8BlocksOp(const ort::Api& api, const ort::KernelInfo* info) : Product8(api, info) {
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
    Rows rows(api, context, matrix.cols);
    Linear8 l = matrix;
    if (const ort::Value* factor = optional(context, 4)) l.factor = array<float>(api, factor, rows.count * l.cols);
    multiply(context, rows, l, {matrix.rows, 0, 0});
  }
};

}  // namespace

const ort::CustomOp* linear8_op() { return custom_op<Linear8Op>(); }
const ort::CustomOp* linear8_blocks_op() { return custom_op<Linear8BlocksOp>(); }

}  // namespace vlpack
