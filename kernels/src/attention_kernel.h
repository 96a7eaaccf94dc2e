// Attention with a running softmax, for the instruction set that the including file is compiled for.
//
// Scores are computed transposed: a vector holds one key's scores for neighbouring queries. So the maximum and the sum
// over keys need no operations across the lanes of a vector. Both products (scores, and weighted values) have the same
// form: an element, or a pair of elements, of one operand is broadcast and multiplied by a vector of the other.
//
// A task is a block of queries of one key head: of neighbouring tokens, and for each token of all query heads that share
// the key head. It processes the keys in blocks of kBlock and keeps the largest score so far, the sum of exponentials and
// the weighted sum of values, which are rescaled when the largest score changes (Milakov and Gimelshein 2018; Dao et al.
// 2022). Keys after those that the block's last token attends to are skipped.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace vlpack {
namespace {

constexpr int kBlock = 64;         // number of keys in a block
constexpr float kHidden = -1e30f;  // score of a key that gets no weight
constexpr float kSlack = 8;        // by how much scores may exceed `largest` without rescaling, as exponents of base 2
constexpr int kLanes = Floats::kLanes;
constexpr int kRows = Floats::kRows;

// The scratch memory of a thread: at least `count` floats, aligned to a cache line.
inline float* thread_memory(int64_t count) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < count + 16) memory.resize(count + 16);
  float* first = memory.data();
  return first + (64 - reinterpret_cast<uintptr_t>(first) % 64) % 64 / sizeof(float);
}

// Starts to load elements that are used later, because the processor itself does not look beyond a page of memory.
template <class Element>
VLPACK_INLINE void expect(const Element* from, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(Element)); at += 64)
    _mm_prefetch(bytes + at, _MM_HINT_T0);
}

// Distance in floats of a query of a key head from the first one. Queries are counted token by token.
inline int64_t query_place(const Attention& a, int64_t query) {
  return query / a.group * a.q_row + query % a.group * a.q_head;
}
// Distance of the first query of a key head from the first of all, and the same for keys; heads are counted over sequences.
inline int64_t queries_place(const Attention& a, int64_t head) {
  return head / a.heads * a.q_batch + head % a.heads * a.group * a.q_head;
}
inline int64_t keys_place(const Attention& a, int64_t head) {
  return head / a.heads * a.k_batch + head % a.heads * a.k_head;
}
// Number of keys that a query attends to.
inline int64_t keys_of(const Attention& a, int64_t query) { return std::min(a.keys, a.visible + query / a.group); }

// Attention with products in fp32. Keys and values are multiplied where they are, so nothing is packed.
struct Attend {
  static int64_t room(const Attention&) { return 0; }
  static int64_t packs(const Attention&) { return 0; }
  static void pack(const Attention&, void*, int64_t) {}

  static constexpr int64_t kQueries = Floats::kColumns * kLanes;  // number of queries of one task
  static int64_t blocks(const Attention& a) { return (a.queries * a.group + kQueries - 1) / kQueries; }
  static int64_t tasks(const Attention& a) { return a.batch * a.heads * blocks(a); }

  static void run(const Attention& a, const void*, int64_t task) {
    // later blocks attend to more keys, so they come first
    const int64_t per_head = blocks(a), head = task / per_head, first = (per_head - 1 - task % per_head) * kQueries;
    const int64_t left = a.queries * a.group - first;
    if (left > 2 * kLanes) return run_block<3>(a, head, first);
    if (left > kLanes) return run_block<2>(a, head, first);
    return run_block<1>(a, head, first);
  }

  // Products of `Count` rows with `Columns` vectors, stored in `sums` as [Count, Columns] vectors, or added to them.
  template <int Columns, int Count>
  static VLPACK_INLINE void multiply(
      const float* rows, int64_t row, int64_t step, int64_t steps, const float* packed, float* sums, bool add) {
    constexpr int kWidth = Columns * kLanes;
    Floats sum[Count][Columns];
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < Columns; ++c) sum[r][c] = add ? Floats::load(sums + r * kWidth + c * kLanes) : Floats::all(0);
    }
    for (int64_t s = 0; s < steps; ++s) {
      Floats operand[Columns];
#pragma GCC unroll 3
      for (int c = 0; c < Columns; ++c) operand[c] = Floats::load(packed + s * kWidth + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        const Floats spread = Floats::all(rows[r * row + s * step]);
#pragma GCC unroll 3
        for (int c = 0; c < Columns; ++c) sum[r][c] = Floats::fma(spread, operand[c], sum[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < Columns; ++c) sum[r][c].store(sums + r * kWidth + c * kLanes);
    }
  }

  // The scratch memory of a task: transposed queries, scores, which become exponentials, and weighted values.
  struct Scratch {
    float *queries, *scores, *values;

    Scratch(int64_t size, int64_t width) {
      float* next = thread_memory(width * (2 * size + kBlock));
      auto take = [&](int64_t count) { return std::exchange(next, next + count); };
      queries = take(width * size);
      values = take(width * size);
      scores = take(width * kBlock);
    }
  };

  // Queries first … first + Columns · kLanes of one head.
  template <int Columns>
  static void run_block(const Attention& a, int64_t head, int64_t first) {
    constexpr int kWidth = Columns * kLanes;
    const int64_t count = std::min<int64_t>(kWidth, a.queries * a.group - first), size = a.size;
    const int64_t at = queries_place(a, head), every = keys_of(a, first), some = keys_of(a, first + count - 1);
    const float* const k = static_cast<const float*>(a.k) + keys_place(a, head);
    const float* const v = static_cast<const float*>(a.v) + keys_place(a, head);
    const Scratch scratch(size, kWidth);

    turn_queries<kWidth>(a, a.q + at, first, count, scratch);
    std::memset(scratch.values, 0, sizeof(float) * size * kWidth);
    Floats largest[Columns], sum[Columns];
    for (int c = 0; c < Columns; ++c) largest[c] = Floats::all(kHidden), sum[c] = Floats::all(0);

    for (int64_t start = 0; start < some; start += kBlock) {
      const int64_t keys = std::min<int64_t>(kBlock, some - start);
      const float *these = k + start * a.k_row, *values = v + start * a.k_row;
      int64_t row = 0, d = 0;
      for (; row + kRows <= keys; row += kRows)
        multiply<Columns, kRows>(these + row * a.k_row, a.k_row, 1, size, scratch.queries,
                                 scratch.scores + row * kWidth, false);
      for (; row < keys; ++row)
        multiply<Columns, 1>(these + row * a.k_row, a.k_row, 1, size, scratch.queries, scratch.scores + row * kWidth,
                             false);
      if (start + keys > every) hide<kWidth>(a, first, start, std::max<int64_t>(every - start, 0), keys, scratch.scores);
      soften<Columns>(scratch, keys, size, largest, sum);
      for (; d + kRows <= size; d += kRows)
        multiply<Columns, kRows>(values + d, 1, a.k_row, keys, scratch.scores, scratch.values + d * kWidth, true);
      for (; d < size; ++d)
        multiply<Columns, 1>(values + d, 1, a.k_row, keys, scratch.scores, scratch.values + d * kWidth, true);
    }
    for (int c = 0; c < Columns; ++c) {
      const Floats factor = Floats::all(1) / (some > 0 ? sum[c] : Floats::all(1));
      for (int64_t d = 0; d < size; ++d) {
        float* value = scratch.values + d * kWidth + c * kLanes;
        (Floats::load(value) * factor).store(value);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float* out = a.out + at + query_place(a, first + i);
      for (int64_t d = 0; d < size; ++d) out[d] = scratch.values[d * kWidth + i];
    }
  }

  // Transposes queries to [size, width], scaled so that differences of scores are exponents of base 2.
  template <int Width>
  static void turn_queries(const Attention& a, const float* q, int64_t first, int64_t count, const Scratch& scratch) {
    const float factor = a.scale * 1.44269504f;
    std::memset(scratch.queries, 0, sizeof(float) * a.size * Width);
    for (int64_t i = 0; i < count; ++i) {
      const float* from = q + query_place(a, first + i);
      for (int64_t d = 0; d < a.size; ++d) scratch.queries[d * Width + i] = from[d] * factor;
    }
  }

  // Hides rows from … keys of a block of scores from the queries that do not attend to them.
  template <int Width>
  static void hide(const Attention& a, int64_t first, int64_t start, int64_t from, int64_t keys, float* scores) {
    alignas(64) float limits[Width];
    for (int i = 0; i < Width; ++i) limits[i] = static_cast<float>(keys_of(a, first + i) - start);
    for (int64_t row = from; row < keys; ++row)
      for (int c = 0; c < Width; c += kLanes) {
        float* at = scores + row * Width + c;
        Floats::where_less(Floats::all(static_cast<float>(row)), Floats::load(limits + c), Floats::load(at),
                           Floats::all(kHidden))
            .store(at);
      }
  }

  // Turns scores into exponentials of their differences from the largest score so far, and rescales sum and values if
  // that has become much larger.
  template <int Columns>
  static VLPACK_INLINE void soften(
      const Scratch& scratch, int64_t keys, int64_t size, Floats (&largest)[Columns], Floats (&sum)[Columns]) {
    constexpr int kWidth = Columns * kLanes;
#pragma GCC unroll 3
    for (int c = 0; c < Columns; ++c) {
      float* const scores = scratch.scores + c * kLanes;
      Floats top = largest[c];
      for (int64_t row = 0; row < keys; ++row) top = Floats::max(top, Floats::load(scores + row * kWidth));
      // each lane decides by itself, so that the result of a query does not depend on its neighbours
      const Floats above = largest[c] + Floats::all(kSlack);
      const bool rescale = Floats::any_less(above, top);
      top = Floats::where_less(above, top, top, largest[c]);
      const Floats shrink = exp2(largest[c] - top);
      Floats total = sum[c] * shrink;
      for (int64_t row = 0; row < keys; ++row) {
        const Floats weight = exp2(Floats::load(scores + row * kWidth) - top);
        weight.store(scores + row * kWidth);
        total = total + weight;
      }
      for (int64_t d = 0; rescale && d < size; ++d) {
        float* value = scratch.values + d * kWidth + c * kLanes;
        (Floats::load(value) * shrink).store(value);
      }
      largest[c] = top, sum[c] = total;
    }
  }
};

}  // namespace
}  // namespace vlpack
