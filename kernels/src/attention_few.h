// Attention of one or few queries, for the instruction set that the including file is compiled for.
//
// The time is that of reading keys and values from memory, so products are in fp32, and keys and values are read once
// for all queries of a key head. Here the lanes of a vector are channels.
#pragma once

#include "attention_kernel.h"
#include "bytes.h"

namespace vlpack {
namespace {

struct AttendFew {
  static constexpr int64_t kMost = 16;                  // largest number of queries of a key head
  static constexpr int kTogether = kLanes == 16 ? 4 : 2;  // number of queries in registers at a time
  static constexpr int kKeys = 4;                         // number of keys in registers at a time

  static int64_t tasks(const Attention& a) { return a.batch * a.heads; }

  // The queries of one key head.
  static void run(const Attention& a, int64_t head) {
    if (a.narrow) run_on(a, static_cast<const uint16_t*>(a.k), static_cast<const uint16_t*>(a.v), head);
    else run_on(a, static_cast<const float*>(a.k), static_cast<const float*>(a.v), head);
  }

  template <class Key>
  static void run_on(const Attention& a, const Key* k, const Key* v, int64_t head) {
    const int64_t count = a.queries * a.group, width = (a.size + kLanes - 1) / kLanes * kLanes;
    float* q = thread_memory(count * (2 * width + kBlock));  // [count, width], scaled, and padded with zeros
    float* values = q + count * width;                       // [count, width]
    float* weights = values + count * width;                 // [count, kBlock]
    std::memset(q, 0, sizeof(float) * 2 * count * width);
    Floats largest[kMost], sum[kMost];
    for (int64_t i = 0; i < count; ++i) {
      const float* from = a.q + queries_place(a, head) + query_place(a, i);
      for (int64_t d = 0; d < a.size; ++d) q[i * width + d] = from[d] * a.scale * 1.44269504f;
      largest[i] = Floats::all(kHidden), sum[i] = Floats::all(0);
    }
    const int64_t some = keys_of(a, count - 1);
    for (int64_t start = 0; start < some; start += kBlock) {
      const int64_t keys = std::min<int64_t>(kBlock, some - start), from = keys_place(a, head) + start * a.k_row;
      for (int64_t i = 0; i < count; i += kTogether) {
        const int64_t left = count - i;
        float *these = weights + i * kBlock, *sums = values + i * width;
        if (left >= 4 && kTogether == 4) score<4>(a, k + from, keys, q + i * width, width, these);
        else if (left == 3 && kTogether == 4) score<3>(a, k + from, keys, q + i * width, width, these);
        else if (left >= 2) score<2>(a, k + from, keys, q + i * width, width, these);
        else score<1>(a, k + from, keys, q + i * width, width, these);
        for (int64_t n = i; n < std::min<int64_t>(i + kTogether, count); ++n) {
          const int64_t seen = std::min<int64_t>(keys, keys_of(a, n) - start);
          soften(seen, width, largest[n], sum[n], weights + n * kBlock, values + n * width);
        }
        if (left >= 4 && kTogether == 4) add_values<4>(a, v + from, keys, these, width, sums);
        else if (left == 3 && kTogether == 4) add_values<3>(a, v + from, keys, these, width, sums);
        else if (left >= 2) add_values<2>(a, v + from, keys, these, width, sums);
        else add_values<1>(a, v + from, keys, these, width, sums);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float factor = some > 0 ? 1 / total(sum[i]) : 1;
      float* out = a.out + queries_place(a, head) + query_place(a, i);
      for (int64_t d = 0; d < a.size; ++d) out[d] = values[i * width + d] * factor;
    }
  }

  // Scores [Count, kBlock] of a block of keys; those after the last key repeat it.
  template <int Count, class Key>
  static VLPACK_INLINE void score(
      const Attention& a, const Key* k, int64_t keys, const float* q, int64_t width, float* scores) {
    for (int64_t row = 0; row < keys; row += kKeys) {
      const Key* rows[kKeys];
      for (int r = 0; r < kKeys; ++r) rows[r] = k + std::min(row + r, keys - 1) * a.k_row;
      for (int r = 0; r < kKeys; ++r) expect(rows[r] + kBlock * a.k_row, a.size);
      Floats sums[Count][kKeys];
      for (int i = 0; i < Count; ++i)
        for (int r = 0; r < kKeys; ++r) sums[i][r] = Floats::all(0);
      for (int64_t d = 0; d < a.size; d += kLanes) {
        Floats key[kKeys];
#pragma GCC unroll 4
        for (int r = 0; r < kKeys; ++r)
          key[r] = d + kLanes <= a.size ? Floats::load(rows[r] + d) : load_some(rows[r] + d, a.size - d);
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i) {
          const Floats query = Floats::load(q + i * width + d);
#pragma GCC unroll 4
          for (int r = 0; r < kKeys; ++r) sums[i][r] = Floats::fma(query, key[r], sums[i][r]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i)
        store_totals(sums[i][0], sums[i][1], sums[i][2], sums[i][3], scores + i * kBlock + row);
    }
  }

  // Turns the first `seen` scores of a block into exponentials of their differences from the largest score so far, and
  // the others into zeros.
  static VLPACK_INLINE void soften(
      int64_t seen, int64_t width, Floats& largest, Floats& sum, float* scores, float* values) {
    for (int64_t n = std::max<int64_t>(seen, 0); n < kBlock; ++n) scores[n] = kHidden;
    Floats top = largest;
    for (int n = 0; n < kBlock; n += kLanes) top = Floats::max(top, Floats::load(scores + n));
    alignas(64) float lanes[kLanes];
    top.store(lanes);
    float most = lanes[0];
    for (int n = 1; n < kLanes; ++n) most = std::max(most, lanes[n]);
    top = Floats::all(most);
    const Floats shrink = exp2(largest - top);
    sum = sum * shrink;
    for (int n = 0; n < kBlock; n += kLanes) {
      const Floats weight = exp2(Floats::load(scores + n) - top);
      weight.store(scores + n);
      sum = sum + weight;
    }
    largest.store(lanes);
    if (!(lanes[0] == most))
      for (int64_t d = 0; d < width; d += kLanes) (Floats::load(values + d) * shrink).store(values + d);
    largest = top;
  }

  // Adds a block's values, weighted, to values [Count, width].
  template <int Count, class Key>
  static VLPACK_INLINE void add_values(
      const Attention& a, const Key* v, int64_t keys, const float* weights, int64_t width, float* values) {
    constexpr int kMany = (kLanes == 16 ? 16 : 8) / Count;
    int64_t d = 0;
    for (; d + kMany * kLanes <= a.size; d += kMany * kLanes)
      add_columns<Count, kMany>(a, v + d, keys, weights, width, values + d);
    for (; d + kLanes <= a.size; d += kLanes) add_columns<Count, 1>(a, v + d, keys, weights, width, values + d);
    if (d < a.size) add_columns<Count, 1>(a, v + d, keys, weights, width, values + d, a.size - d);
  }

  // The part of `add_values` for some columns of vectors, or for one column of which only `left` channels exist.
  template <int Count, int Columns, class Key>
  static VLPACK_INLINE void add_columns(const Attention& a, const Key* v, int64_t keys, const float* weights,
                                        int64_t width, float* values, int64_t left = 0) {
    Floats sums[Count][Columns];
    for (int i = 0; i < Count; ++i)
      for (int c = 0; c < Columns; ++c) sums[i][c] = Floats::load(values + i * width + c * kLanes);
    for (int64_t row = 0; row < keys; ++row) {
      expect(v + (row + kBlock) * a.k_row, Columns * kLanes);
      Floats weight[Count];
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i) weight[i] = Floats::all(weights[i * kBlock + row]);
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) {
        const Key* at = v + row * a.k_row + c * kLanes;
        const Floats value = left ? load_some(at, left) : Floats::load(at);
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i) sums[i][c] = Floats::fma(weight[i], value, sums[i][c]);
      }
    }
    for (int i = 0; i < Count; ++i)
      for (int c = 0; c < Columns; ++c) sums[i][c].store(values + i * width + c * kLanes);
  }
};

// The form of attention that suits the number of queries: `Fast` products, products in fp32, or few queries.
template <class Fast>
struct AttendBest {
  static constexpr int64_t kFastFrom = 48;  // number of queries of a key head from which packing pays

  static bool few(const Attention& a) { return a.queries * a.group <= AttendFew::kMost; }
  static bool fast(const Attention& a) {
    return !few(a) && !a.exact && (a.narrow || a.queries * a.group >= kFastFrom);
  }

  static int64_t room(const Attention& a) { return fast(a) ? Fast::room(a) : 0; }
  static int64_t packs(const Attention& a) { return fast(a) ? Fast::packs(a) : 0; }
  static void pack(const Attention& a, void* room, int64_t task) { Fast::pack(a, room, task); }

  static int64_t tasks(const Attention& a) {
    return few(a) ? AttendFew::tasks(a) : fast(a) ? Fast::tasks(a) : Attend::tasks(a);
  }
  static void run(const Attention& a, const void* room, int64_t task) {
    if (few(a)) return AttendFew::run(a, task);
    if (fast(a)) return Fast::run(a, room, task);
    return Attend::run(a, room, task);
  }
};

}  // namespace
}  // namespace vlpack
