#include "causal_attention_op.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "op.h"

namespace vlpack {
namespace {

// Inputs; those between them are never given.
enum : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLastKeys, kTotal, kNewTokens = 16 };

constexpr int64_t kCopiedAtOnce = 1 << 15;  // number of new floats up to which one thread writes them to the cache

// The tokens of one sequence.
struct Row {
  int64_t held, count;  // number of keys before the call, and of new tokens
};

// Attention with a cache of `Cell` numbers: floats, or bfloat16.
template <class Cell>
struct CausalAttentionOp {
  static constexpr bool kNarrow = sizeof(Cell) == 2;
  static constexpr const char* kName = kNarrow ? "NarrowGroupQueryAttention" : "GroupQueryAttention";
  static constexpr int kCell = kNarrow ? ort::kBrain : ort::kFloat;
  static constexpr size_t kInputs = kNewTokens + 1, kOutputs = 3;
  static int input_type(size_t index) {
    if (index == kLastKeys || index == kTotal || index == kNewTokens) return ort::kInt32;
    return index == kPastKey || index == kPastValue ? kCell : int{ort::kFloat};
  }
  static int output_type(size_t index) { return index == 0 ? int{ort::kFloat} : kCell; }
  static int presence(size_t index) { return index <= kTotal ? ort::kRequired : ort::kOptional; }

  ort::Api api;
  int64_t heads, key_heads;
  float scale;
  bool exact;

  CausalAttentionOp(const ort::Api& api, const ort::KernelInfo* info)
      : api(api), heads(api.int_attribute(info, "num_heads")), key_heads(api.int_attribute(info, "kv_num_heads")),
        scale(api.float_attribute(info, "scale")), exact(!kNarrow && api.int_attribute(info, "exact") != 0) {
    if (key_heads < 1 || heads < 1 || heads % key_heads)
      throw ort::Error{"num_heads must be a positive multiple of kv_num_heads"};
    if (kNarrow && !best_kernels()->narrow) throw ort::Error{"it needs a processor with AVX-512 and bfloat16"};
  }

  void run(ort::KernelContext* context) const {
    const Kernels& kernels = *best_kernels();
    int64_t q[3], k[3], v[3], past[4], past_v[4];
    const float* query = tensor<float>(context, kQuery, q, 3);
    const float* new_tensors[2] = {tensor<float>(context, kKey, k, 3), tensor<float>(context, kValue, v, 3)};
    const Cell* past_tensors[2] = {tensor<Cell>(context, kPastKey, past, 4),
                                   tensor<Cell>(context, kPastValue, past_v, 4)};
    const int64_t batch = q[0], tokens = q[1], size = q[2] / heads, width = key_heads * size;
    if (size < 1 || size * heads != q[2]) throw ort::Error{"the width of q is not a positive multiple of num_heads"};
    for (const int64_t* sizes : {k, v})
      if (sizes[0] != batch || sizes[1] != tokens || sizes[2] != width)
        throw ort::Error{"k and v must have the batch, the length and the head size of q"};
    for (const int64_t* sizes : {past, past_v})
      if (sizes[0] != batch || sizes[1] != key_heads || sizes[2] != past[2] || sizes[3] != size)
        throw ort::Error{"past keys and values must be [batch, kv_num_heads, P, head size]"};

    const int64_t total = *integers(context, kTotal, 1);
    const std::vector<Row> rows = read_rows(context, batch, tokens, total);
    past[2] = std::max(past[2], total);
    float* out = static_cast<float*>(api.data(api.output(context, 0, q, 3)));
    Cell* present[2];
    for (int i = 0; i < 2; ++i) present[i] = static_cast<Cell*>(api.data(api.output(context, 1 + i, past, 4)));

    // one row of the cache and one of its heads at a time
    const int64_t room = past[2], before = past_v[2];
    auto write = [&](int64_t task) {
      const Row& row = rows[task / key_heads];
      const int64_t head = task % key_heads;
      for (int i = 0; i < 2; ++i) {
        Cell* to = present[i] + task * room * size;
        if (present[i] != past_tensors[i] && before > 0)
          std::memcpy(to, past_tensors[i] + task * before * size, sizeof(Cell) * std::min(row.held, before) * size);
        const float* from = new_tensors[i] + task / key_heads * tokens * width + head * size;
        for (int64_t t = 0; t < row.count; ++t)
          put(kernels, from + t * width, to + (row.held + t) * size, size);
      }
    };
    if (present[0] == past_tensors[0] && batch * tokens * width <= kCopiedAtOnce)
      for (int64_t task = 0; task < batch * key_heads; ++task) write(task);
    else
      ort::parallel_for(api, context, batch * key_heads, write);

    std::vector<Attention> parts;
    for (int64_t b = 0; b < batch; ++b) {
      Attention a{};
      a.q = query + b * tokens * q[2], a.out = out + b * tokens * q[2];
      a.k = present[0] + b * key_heads * room * size, a.v = present[1] + b * key_heads * room * size;
      a.batch = 1, a.heads = key_heads, a.group = heads / key_heads, a.size = size, a.queries = rows[b].count;
      a.keys = rows[b].held + rows[b].count, a.visible = rows[b].held + 1;
      a.q_row = q[2], a.q_head = size, a.k_row = size, a.k_head = room * size;
      a.scale = scale > 0 ? scale : 1 / std::sqrt(static_cast<float>(size));
      a.exact = exact, a.narrow = kNarrow;
      std::fill(a.out + rows[b].count * q[2], a.out + tokens * q[2], 0.f);
      if (a.queries) parts.push_back(a);
    }
    attend(kernels, context, parts);
  }

  // Writes new numbers to the cache.
  static void put(const Kernels&, const float* from, float* to, int64_t count) {
    std::memcpy(to, from, sizeof(float) * count);
  }
  static void put(const Kernels& kernels, const float* from, uint16_t* to, int64_t count) {
    kernels.narrow(from, to, count);
  }

  // Attention of all parts, whose tasks run at the same time.
  void attend(const Kernels& kernels, ort::KernelContext* context, const std::vector<Attention>& parts) const {
    std::vector<int64_t> rooms{0}, packs{0}, tasks{0};  // sums over the parts before each one
    for (const Attention& a : parts) {
      rooms.push_back(rooms.back() + kernels.attention_room(a));
      packs.push_back(packs.back() + kernels.attention_packs(a));
      tasks.push_back(tasks.back() + kernels.attention_tasks(a));
    }
    const std::unique_ptr<char[]> room(new char[rooms.back()]);
    auto each = [&](const std::vector<int64_t>& ends, auto call) {
      ort::parallel_for(api, context, ends.back(), [&](int64_t task) {
        const int64_t part = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin() - 1;
        call(parts[part], room.get() + rooms[part], task - ends[part]);
      });
    };
    each(packs, kernels.attention_pack);
    each(tasks, kernels.attention_run);
  }

  // The tokens of each sequence. `query_seqlens` gives the number of new tokens; without it, all have as many, or fewer
  // if seqlens_k says that padding follows them.
  std::vector<Row> read_rows(ort::KernelContext* context, int64_t batch, int64_t tokens, int64_t total) const {
    const int32_t* last = integers(context, kLastKeys, batch);
    const bool given = api.input_count(context) > kNewTokens && api.input(context, kNewTokens);
    const int32_t* counts = given ? integers(context, kNewTokens, batch) : nullptr;
    std::vector<Row> rows;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t keys = int64_t{last[b]} + 1, count = counts ? counts[b] : std::min(tokens, keys);
      if (keys < 0 || keys > total || count < 0 || count > std::min(keys, tokens))
        throw ort::Error{"seqlens_k, total_sequence_length and query_seqlens contradict each other"};
      rows.push_back({keys - count, count});
    }
    return rows;
  }

  template <class Element>
  const Element* tensor(ort::KernelContext* context, size_t index, int64_t* sizes, size_t rank) const {
    const ort::Value* value = api.input(context, index);
    if (api.sizes(value, sizes, rank) != rank)
      throw ort::Error{"q, k and v must have three dimensions, and past keys and values four"};
    return static_cast<const Element*>(api.data(value));
  }

  const int32_t* integers(ort::KernelContext* context, size_t index, int64_t count) const {
    int64_t sizes[2], found = 1;
    const ort::Value* value = api.input(context, index);
    const size_t rank = api.sizes(value, sizes, 2);
    for (size_t i = 0; i < rank; ++i) found *= sizes[i];
    if (found != count) throw ort::Error{"seqlens_k and query_seqlens must have one number for each sequence"};
    return static_cast<const int32_t*>(api.data(value));
  }
};

}  // namespace

const ort::CustomOp* causal_attention_op() { return custom_op<CausalAttentionOp<float>>(); }
const ort::CustomOp* narrow_causal_attention_op() { return custom_op<CausalAttentionOp<uint16_t>>(); }

}  // namespace vlpack
