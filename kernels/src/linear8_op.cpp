#include "linear8_op.h"

#include <memory>

#include "kernels.h"
#include "pages.h"
#include "product_op.h"

namespace vlpack {
namespace {

constexpr int64_t kInline = 1 << 12;  // largest number of values that are quantized in the calling thread

// The part that both operators share.
struct Product8 : ProductOp {
  static constexpr size_t kRotation = 3, kInputs = kRotation + kShared;
  static int presence(size_t index) { return index >= kRotation ? ort::kOptional : ort::kRequired; }

  Linear8 matrix{};
  Pages codes;

  Product8(const ort::Api& api, const ort::KernelInfo* info) : ProductOp(api, info, kRotation) {}

  // Checks the sizes and copies the codes into the layout of the kernels.
  void lay(const ort::KernelInfo* info, const uint8_t* from, int64_t size) {
    if (matrix.cols < 1 || matrix.rows < 1) throw ort::Error{"K and N must be positive"};
    split(info, matrix.rows);
    const Linear8Kernels& kernels = best_kernels()->linear8;
    codes = Pages(kernels.bytes(matrix));
    kernels.lay(matrix, from, codes.data());
    not_needed(from, size);
    matrix.codes = codes.data();
  }

  void multiply(ort::KernelContext* context, Linear8& l) const {
    const Linear8Kernels& kernels = best_kernels()->linear8;
    fill(context, l);
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
  static int input_type(size_t index) { return index == 1 ? ort::kInt8 : ort::kFloat; }

  Linear8Op(const ort::Api& api, const ort::KernelInfo* info) : Product8(api, info) {
    const ort::Value* given = constant(info, 1);
    int64_t sizes[2];
    if (api.sizes(given, sizes, 2) != 2) throw ort::Error{"codes must have two dimensions"};
    matrix.cols = sizes[0], matrix.rows = sizes[1];
    lay(info, static_cast<const uint8_t*>(api.data(given)), matrix.rows * matrix.cols);
  }

  void run(ort::KernelContext* context) const {
    Linear8 l = matrix;
    l.scales = array<float>(api, api.input(context, 2), l.rows);
    multiply(context, l);
  }
};

struct Linear8BlocksOp : Product8 {
  Pages laid_scales;

  static constexpr const char* kName = "Linear8Blocks";
  static int input_type(size_t index) { return index == 1 ? ort::kUint8 : ort::kFloat; }

  Linear8BlocksOp(const ort::Api& api, const ort::KernelInfo* info) : Product8(api, info) {
    matrix.cols = api.int_attribute(info, "K"), matrix.rows = api.int_attribute(info, "N");
    matrix.block = api.int_attribute(info, "block_size");
    if (matrix.block < 16 || matrix.block % 16) throw ort::Error{"block_size must be a multiple of 16"};
    const int64_t blocks = matrix.rows * matrix.blocks(), size = blocks * matrix.block;
    const uint8_t* given = array<uint8_t>(api, constant(info, 1), size);
    const float* all = array<float>(api, constant(info, 2), blocks);
    lay(info, given, size);
    laid_scales = Pages(best_kernels()->linear8.scales(matrix) * sizeof(float));
    float* const laid = reinterpret_cast<float*>(laid_scales.data());
    best_kernels()->linear8.lay_scales(matrix, all, laid);
    not_needed(all, blocks * sizeof(float));
    matrix.scales = laid;
  }

  void run(ort::KernelContext* context) const {
    Linear8 l = matrix;
    multiply(context, l);
  }
};

}  // namespace

const ort::CustomOp* linear8_op() { return custom_op<Linear8Op>(); }
const ort::CustomOp* linear8_blocks_op() { return custom_op<Linear8BlocksOp>(); }

}  // namespace vlpack
