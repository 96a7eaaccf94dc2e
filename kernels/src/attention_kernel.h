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

// Products in fp32.
struct Single {
  using Element = float;
  static constexpr int kPair = 1;  // number of elements that one step of a product takes
  static constexpr bool kPacks = false;  // keys and values are multiplied where they are
  static constexpr int kTerms = 6;
  static VLPACK_INLINE Floats dot(const Element* spread, Floats packed, Floats sum) {
    return Floats::fma(Floats::all(*spread), packed, sum);
  }
  static VLPACK_INLINE Floats operand(const Element* p) { return Floats::load(p); }
  static VLPACK_INLINE void put(Element* to, Floats a, Floats) { a.store(to); }
  static VLPACK_INLINE Element element(float x) { return x; }
};

#ifdef __AVX512BF16__
// Products of bfloat16 numbers, summed in fp32: an instruction computes twice as many as in fp32.
struct Brain {
  using Element = uint16_t;
  static constexpr int kPair = 2;
  static constexpr bool kPacks = true;
  static constexpr int kTerms = 3;  // an error below that of rounding exponentials to the 8 bits of bfloat16
  static VLPACK_INLINE Floats dot(const Element* spread, Floats packed, Floats sum) {
    int32_t pair;
    std::memcpy(&pair, spread, sizeof pair);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)packed.v)};
  }
  static VLPACK_INLINE Floats operand(const Element* p) { return {_mm512_loadu_ps(p)}; }
  // Interleaves two vectors: a and b are neighbours in the direction of the sum.
  static VLPACK_INLINE void put(Element* to, Floats a, Floats b) {
    const __m512i joined = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), joined));
  }
  static VLPACK_INLINE Element element(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : static_cast<Element>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // rounds ties to even
  }
  static VLPACK_INLINE Element element(Element x) { return x; }
};
#endif

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

// Attention with one kind of products.
template <class Product>
struct Attend {
  using Element = typename Product::Element;
  static constexpr int kPair = Product::kPair;

  // Number of steps of a product over `size` elements.
  static int64_t steps(int64_t size) { return (size + kPair - 1) / kPair; }
  // Number of elements of one head's packed keys, [keys, steps · kPair], and values, [keys / kPair, size, kPair].
  static int64_t key_room(const Attention& a) { return a.keys * steps(a.size) * kPair; }
  static int64_t value_room(const Attention& a) { return steps(a.keys) * a.size * kPair; }

  static int64_t room(const Attention& a) {
    if (!Product::kPacks) return 0;
    return a.batch * a.heads * (key_room(a) + value_room(a)) * static_cast<int64_t>(sizeof(Element));
  }

  static constexpr int64_t kPacked = 256;  // number of rows that one task packs; a multiple of kPair
  static int64_t pack_tasks_per_head(const Attention& a) { return (a.keys + kPacked - 1) / kPacked; }
  static int64_t packs(const Attention& a) { return Product::kPacks ? a.batch * a.heads * pack_tasks_per_head(a) : 0; }

  // The keys and values of a head. Adjacent keys are `k_row` elements apart, and adjacent pairs of values `v_row`.
  struct Packed {
    const Element *k, *v;
    int64_t k_row, v_row;
  };
  static Packed packed(const Attention& a, const void* room, int64_t head) {
    if constexpr (Product::kPacks) {
      const Element* k = static_cast<const Element*>(room) + head * (key_room(a) + value_room(a));
      return {k, k + key_room(a), steps(a.size) * kPair, a.size * kPair};
    } else {
      const int64_t from = keys_place(a, head);
      return {static_cast<const float*>(a.k) + from, static_cast<const float*>(a.v) + from, a.k_row, a.k_row};
    }
  }

  static void pack(const Attention& a, void* room, int64_t task) {
    if constexpr (Product::kPacks) {
      if (a.narrow) pack_from(a, static_cast<const uint16_t*>(a.k), static_cast<const uint16_t*>(a.v), room, task);
      else pack_from(a, static_cast<const float*>(a.k), static_cast<const float*>(a.v), room, task);
    }
  }

  template <class Source>
  static void pack_from(const Attention& a, const Source* keys, const Source* values, void* room, int64_t task) {
    const int64_t per_head = pack_tasks_per_head(a), head = task / per_head, first = task % per_head * kPacked;
    const int64_t last = std::min(first + kPacked, a.keys), width = steps(a.size) * kPair;
    const int64_t from = keys_place(a, head);
    Element* k = static_cast<Element*>(room) + head * (key_room(a) + value_room(a));
    Element* v = k + key_room(a);
    for (int64_t row = first; row < last; ++row) {
      const Source* source = keys + from + row * a.k_row;
      Element* to = k + row * width;
      for (int64_t d = 0; d < a.size; ++d) to[d] = Product::element(source[d]);
      for (int64_t d = a.size; d < width; ++d) to[d] = 0;
    }
    for (int64_t row = first; row < last; row += kPair) {
      Element* to = v + row * a.size;
      for (int64_t i = 0; i < kPair; ++i) {
        const Source* source = values + from + (row + i) * a.k_row;
        for (int64_t d = 0; d < a.size; ++d) to[d * kPair + i] = row + i < a.keys ? Product::element(source[d]) : 0;
      }
    }
  }

  static constexpr int64_t kQueries = Floats::kColumns * kLanes;  // number of queries of one task
  static int64_t blocks(const Attention& a) { return (a.queries * a.group + kQueries - 1) / kQueries; }
  static int64_t tasks(const Attention& a) { return a.batch * a.heads * blocks(a); }

  static void run(const Attention& a, const void* room, int64_t task) {
    // later blocks attend to more keys, so they come first
    const int64_t per_head = blocks(a), head = task / per_head, first = (per_head - 1 - task % per_head) * kQueries;
    const int64_t left = a.queries * a.group - first;
    if (left > 2 * kLanes) return run_block<3>(a, room, head, first);
    if (left > kLanes) return run_block<2>(a, room, head, first);
    return run_block<1>(a, room, head, first);
  }

  // Products of `Count` rows with `Columns` vectors, stored in `sums` as [Count, Columns] vectors, or added to them.
  template <int Columns, int Count>
  static VLPACK_INLINE void multiply(
      const Element* rows, int64_t row, int64_t step, int64_t steps, const Element* packed, float* sums, bool add) {
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
      for (int c = 0; c < Columns; ++c) operand[c] = Product::operand(packed + (s * kWidth + c * kLanes) * kPair);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 3
        for (int c = 0; c < Columns; ++c) sum[r][c] = Product::dot(rows + r * row + s * step, operand[c], sum[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < Columns; ++c) sum[r][c].store(sums + r * kWidth + c * kLanes);
    }
  }

  // The scratch memory of a task: packed queries, scores, packed exponentials and weighted values.
  struct Scratch {
    float *turned, *scores, *values;
    Element *queries, *weights;

    Scratch(int64_t size, int64_t width) {
      const int64_t padded = size + kPair;
      float* next = thread_memory(width * (padded * 3 + 2 * kBlock));
      auto take = [&](int64_t count) { return std::exchange(next, next + count); };
      turned = take(width * padded);
      values = take(width * padded);
      queries = reinterpret_cast<Element*>(take(width * padded));
      scores = take(width * kBlock);
      weights = reinterpret_cast<Element*>(take(width * kBlock));
    }
  };

  // Queries first … first + Columns · kLanes of one head.
  template <int Columns>
  static void run_block(const Attention& a, const void* room, int64_t head, int64_t first) {
    constexpr int kWidth = Columns * kLanes;
    const int64_t count = std::min<int64_t>(kWidth, a.queries * a.group - first), size = a.size;
    const int64_t at = queries_place(a, head), every = keys_of(a, first), some = keys_of(a, first + count - 1);
    const Packed packed = Attend::packed(a, room, head);
    const Scratch scratch(size, kWidth);

    turn_queries<kWidth>(a, a.q + at, first, count, scratch);
    std::memset(scratch.values, 0, sizeof(float) * size * kWidth);
    Floats largest[Columns], sum[Columns];
    for (int c = 0; c < Columns; ++c) largest[c] = Floats::all(kHidden), sum[c] = Floats::all(0);

    for (int64_t start = 0; start < some; start += kBlock) {
      const int64_t keys = std::min<int64_t>(kBlock, some - start), k_row = packed.k_row, v_row = packed.v_row;
      const Element* these = packed.k + start * k_row;
      int64_t row = 0;
      for (; row + kRows <= keys; row += kRows)
        multiply<Columns, kRows>(these + row * k_row, k_row, kPair, steps(size), scratch.queries,
                                 scratch.scores + row * kWidth, false);
      for (; row < keys; ++row)
        multiply<Columns, 1>(these + row * k_row, k_row, kPair, steps(size), scratch.queries,
                             scratch.scores + row * kWidth, false);
      if (start + keys > every) hide<kWidth>(a, first, start, std::max<int64_t>(every - start, 0), keys, scratch.scores);
      if (keys % kPair)  // pads the last pair with a key that gets no weight
        for (int c = 0; c < Columns; ++c) Floats::all(kHidden).store(scratch.scores + keys * kWidth + c * kLanes);
      soften<Columns>(scratch, keys, size, largest, sum);
      int64_t d = 0;
      const Element* values = packed.v + start / kPair * v_row;
      for (; d + kRows <= size; d += kRows)
        multiply<Columns, kRows>(values + d * kPair, kPair, v_row, steps(keys), scratch.weights,
                                 scratch.values + d * kWidth, true);
      for (; d < size; ++d)
        multiply<Columns, 1>(values + d * kPair, kPair, v_row, steps(keys), scratch.weights,
                             scratch.values + d * kWidth, true);
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

  // Transposes queries to [steps, width, kPair], scaled so that differences of scores are exponents of base 2.
  template <int Width>
  static void turn_queries(const Attention& a, const float* q, int64_t first, int64_t count, const Scratch& scratch) {
    const float factor = a.scale * 1.44269504f;
    const int64_t width = steps(a.size) * kPair;
    std::memset(scratch.turned, 0, sizeof(float) * width * Width);
    for (int64_t i = 0; i < count; ++i) {
      const float* from = q + query_place(a, first + i);
      for (int64_t d = 0; d < a.size; ++d) scratch.turned[d * Width + i] = from[d] * factor;
    }
    for (int64_t d = 0; d < width; d += kPair)
      for (int64_t i = 0; i < Width; i += kLanes) {
        const float* from = scratch.turned + d * Width + i;
        const Floats next = Floats::load(from + (kPair - 1) * Width);
        Product::put(scratch.queries + d * Width + i * kPair, Floats::load(from), next);
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
      const float* scores = scratch.scores + c * kLanes;
      Floats top = largest[c];
      for (int64_t row = 0; row < keys; ++row) top = Floats::max(top, Floats::load(scores + row * kWidth));
      // each lane decides by itself, so that the result of a query does not depend on its neighbours
      const Floats above = largest[c] + Floats::all(kSlack);
      const bool rescale = Floats::any_less(above, top);
      top = Floats::where_less(above, top, top, largest[c]);
      const Floats shrink = exp2<6>(largest[c] - top);
      Floats total = sum[c] * shrink;
      for (int64_t row = 0; row < keys; row += kPair) {
        Floats pair[2];
        for (int i = 0; i < kPair; ++i) {
          pair[i] = exp2<Product::kTerms>(Floats::load(scores + (row + i) * kWidth) - top);
          total = total + pair[i];
        }
        Product::put(scratch.weights + (row * kWidth + c * kLanes * kPair), pair[0], pair[kPair - 1]);
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
