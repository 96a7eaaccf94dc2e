// Attention with products of bfloat16 numbers, which are summed in fp32, for many queries.
//
// It is the algorithm of attention_kernel.h, with two differences. A step of a product takes two elements of the
// direction of the sum, so both operands hold pairs. And while a block's weighted values are summed, which keeps the
// units for products busy, the exponentials of the next block are computed between the products by the other units.
#pragma once

#ifdef __AVX512BF16__

#include <algorithm>
#include <cstring>
#include <utility>

#include "attention_kernel.h"
#include "bytes.h"
#include "transpose.h"
#include "unroll.h"

namespace vlpack {
namespace {

struct AttendBrain {
  using Element = uint16_t;
  static constexpr int kPairs = kBlock / 2;  // steps of a sum over the keys of a block
  static constexpr int kPart = kPairs / 2;   // pairs of keys whose weights are computed during one tile of values
  static constexpr int kTile = kRows * 2;    // elements of one step of a tile of values
  static constexpr int kUnroll = 2;          // steps between two branches
  static constexpr int64_t kAhead = 16;      // by how many rows keys and values are fetched in advance
  static constexpr int64_t kPacked = 256;      // keys that one task packs; a multiple of kBlock
  static constexpr int kMost = Floats::kColumns;  // vectors of queries of one task

  static int64_t steps(const Attention& a) { return (a.size + 1) / 2; }           // of a sum over channels
  static int64_t tiles(const Attention& a) { return (a.size + kRows - 1) / kRows; }  // of values

  // Keys are packed to [keys, steps, 2], and values to [blocks of keys, tiles, kPairs, kRows, 2]. Keys that are in this
  // form already are used where they are.
  static bool packs_keys(const Attention& a) { return !a.narrow || a.size % 2; }
  static int64_t key_room(const Attention& a) { return packs_keys(a) ? a.keys * steps(a) * 2 : 0; }
  static int64_t value_room(const Attention& a) { return (a.keys + kBlock - 1) / kBlock * block_room(a); }
  static int64_t block_room(const Attention& a) { return tiles(a) * kPairs * kTile; }
  static int64_t room(const Attention& a) {
    return a.batch * a.heads * (key_room(a) + value_room(a)) * static_cast<int64_t>(sizeof(Element));
  }

  static int64_t pack_tasks_per_head(const Attention& a) { return (a.keys + kPacked - 1) / kPacked; }
  static int64_t packs(const Attention& a) { return a.batch * a.heads * pack_tasks_per_head(a); }

  static void pack(const Attention& a, void* room, int64_t task) {
    if (a.narrow) pack_from(a, static_cast<const uint16_t*>(a.k), static_cast<const uint16_t*>(a.v), room, task);
    else pack_from(a, static_cast<const float*>(a.k), static_cast<const float*>(a.v), room, task);
  }

  // Sixteen numbers in bfloat16, or those that the mask has, and zeros.
  static VLPACK_INLINE __m256i narrow(const float* p, __mmask16 some) {
    return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, p));
  }
  static VLPACK_INLINE __m256i narrow(const uint16_t* p, __mmask16 some) { return _mm256_maskz_loadu_epi16(some, p); }
  // The mask of the first `count` lanes.
  static VLPACK_INLINE __mmask16 first(int64_t count) {
    return count >= kLanes ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
  }

  template <class Source>
  static void pack_from(const Attention& a, const Source* keys, const Source* values, void* room, int64_t task) {
    const int64_t per_head = pack_tasks_per_head(a), head = task / per_head, begin = task % per_head * kPacked;
    const int64_t end = std::min(begin + kPacked, a.keys), width = steps(a) * 2, from = keys_place(a, head);
    Element* k = static_cast<Element*>(room) + head * (key_room(a) + value_room(a));
    Element* v = k + key_room(a);
    if (packs_keys(a))
      for (int64_t row = begin; row < end; ++row) {
        const Source* source = keys + from + row * a.k_row;
        expect(source + kAhead * a.k_row, a.size);
        for (int64_t d = 0; d < width; d += kLanes)
          _mm256_mask_storeu_epi16(k + row * width + d, first(width - d), narrow(source + d, first(a.size - d)));
      }
    for (int64_t row = begin; row < end; row += 2) {
      const Source* even = values + from + row * a.k_row;
      const Source* odd = row + 1 < a.keys ? even + a.k_row : nullptr;
      expect(even + kAhead * a.k_row, a.size), expect(even + (kAhead + 1) * a.k_row, a.size);
      Element* to = v + row / kBlock * block_room(a) + row % kBlock / 2 * kTile;
      for (int64_t d = 0; d < a.size; d += kLanes) {
        const __mmask16 some = first(a.size - d);
        const __m512i low = _mm512_cvtepu16_epi32(narrow(even + d, some));
        const __m512i high = odd ? _mm512_cvtepu16_epi32(narrow(odd + d, some)) : _mm512_setzero_si512();
        const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        Element* tile = to + d / kRows * kPairs * kTile;
        _mm256_storeu_si256((__m256i*)tile, _mm512_castsi512_si256(pairs));
        if (d + kRows < a.size)
          _mm256_storeu_si256((__m256i*)(tile + kPairs * kTile), _mm512_extracti64x4_epi64(pairs, 1));
      }
    }
  }

  static int64_t vectors(const Attention& a) { return (a.queries * a.group + kLanes - 1) / kLanes; }
  static int64_t blocks(const Attention& a) { return (vectors(a) + kMost - 1) / kMost; }
  static int64_t tasks(const Attention& a) { return a.batch * a.heads * blocks(a); }

  static void run(const Attention& a, const void* room, int64_t task) {
    // later blocks attend to more keys, so they come first
    const int64_t per_head = blocks(a), head = task / per_head, block = per_head - 1 - task % per_head;
    // a last vector shares four with the block before, because a single one is slow
    const bool shares = vectors(a) % kMost == 1 && per_head > 1;
    const int64_t begin = block * kMost - (shares && block == per_head - 1);
    const int64_t count = shares && block >= per_head - 2 ? 2 : std::min<int64_t>(kMost, vectors(a) - begin);
    if (count == 3) return run_block<3>(Task(a, room, head, begin));
    if (count == 2) return run_block<2>(Task(a, room, head, begin));
    return run_block<1>(Task(a, room, head, begin));
  }

  struct Task {
    const Attention& a;
    const Element *k, *v;           // of the key head
    int64_t k_row, count;           // distance of two keys; number of queries
    const float* q;                 // the first query of the key head, and its output
    float* out;
    int64_t place[kMost * kLanes];  // distances of the queries from it
    int64_t keys[kMost * kLanes];   // how many keys they attend to

    Task(const Attention& a, const void* room, int64_t head, int64_t begin) : a(a) {
      const Element* packed = static_cast<const Element*>(room) + head * (key_room(a) + value_room(a));
      const int64_t first = begin * kLanes;
      k = packs_keys(a) ? packed : static_cast<const Element*>(a.k) + keys_place(a, head);
      v = packed + key_room(a), k_row = packs_keys(a) ? steps(a) * 2 : a.k_row;
      q = a.q + queries_place(a, head), out = a.out + queries_place(a, head);
      count = std::min<int64_t>(kMost * kLanes, a.queries * a.group - first);
      int64_t token = first / a.group, member = first % a.group;  // divisions are slow, so there are only these
      for (int i = 0; i < kMost * kLanes; ++i) {
        place[i] = token * a.q_row + member * a.q_head, keys[i] = std::min(a.keys, a.visible + token);
        if (++member == a.group) ++token, member = 0;
      }
    }
  };

  // The scratch memory of a task with Columns vectors of queries.
  template <int Columns>
  struct Scratch {
    Element* queries;             // [steps, Columns, kLanes, 2]
    float* scores;                // [Columns, kBlock, kLanes]
    Element *weights, *weights2;  // exponentials of two blocks, [kPairs, Columns, kLanes, 2]
    float* values;                // weighted sums, [channels, Columns, kLanes]
    float *top, *largest, *sum, *shrink;  // [Columns, kLanes]

    explicit Scratch(const Attention& a) {
      constexpr int64_t kWidth = Columns * kLanes;
      const int64_t channels = tiles(a) * kRows, query_room = (steps(a) + kLanes - 1) / kLanes * kLanes;
      float* next = thread_memory(kWidth * (query_room + 2 * kBlock + (channels + kLanes) + 4));
      auto take = [&](int64_t count) { return std::exchange(next, next + count); };
      queries = reinterpret_cast<Element*>(take(kWidth * query_room));
      scores = take(kWidth * kBlock);
      weights = reinterpret_cast<Element*>(take(kWidth * kPairs));
      weights2 = reinterpret_cast<Element*>(take(kWidth * kPairs));
      values = take(kWidth * (channels + kLanes));
      top = take(kWidth), largest = take(kWidth), sum = take(kWidth), shrink = take(kWidth);
    }
  };

  // sum + the products of a pair, which is broadcast, and pairs in memory.
  static VLPACK_INLINE Floats dot(const Element* pair, __m512 pairs, Floats sum) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)pairs)};
  }

  // One step of a tile of Count rows, whose pairs are `row` elements apart.
  template <int Columns, int Count>
  static VLPACK_INLINE void step(const Element* rows, int64_t row, const Element* packed, Floats (&sums)[Count][Columns]) {
    __m512 operand[Columns];
    each<Columns>([&](auto c) VLPACK_BODY { operand[c] = _mm512_loadu_ps(packed + c * kLanes * 2); });
    each<Count>([&](auto r) VLPACK_BODY {
      each<Columns>([&](auto c) VLPACK_BODY { sums[r][c] = dot(rows + r * row, operand[c], sums[r][c]); });
    });
  }

  // Scores of Count keys, from row `at` of a block on; raises `top` to the largest.
  template <int Columns, int Count>
  static VLPACK_INLINE void score(const Task& t, const Scratch<Columns>& s, const Element* keys, int64_t at) {
    const int64_t count = steps(t.a), row = t.k_row;
    const Element *rows = keys + at * row, *queries = s.queries;
    Floats sums[Count][Columns];
    each<Count>([&](auto r) VLPACK_BODY {
      each<Columns>([&](auto c) VLPACK_BODY { sums[r][c] = Floats::all(0); });
    });
    int64_t left = count;
    for (; left >= kUnroll; left -= kUnroll) {
      each<kUnroll>([&](auto i) VLPACK_BODY {
        step<Columns, Count>(rows + i * 2, row, queries + i * Columns * kLanes * 2, sums);
      });
      rows += kUnroll * 2, queries += kUnroll * Columns * kLanes * 2;
    }
    for (; left > 0; --left) {
      step<Columns, Count>(rows, row, queries, sums);
      rows += 2, queries += Columns * kLanes * 2;
    }
    float* const scores = s.scores + at * kLanes;
    each<Columns>([&](auto c) VLPACK_BODY {
      Floats top = Floats::load(s.top + c * kLanes);
      each<Count>([&](auto r) VLPACK_BODY {
        sums[r][c].store(scores + c * kBlock * kLanes + r * kLanes);
        top = Floats::max(top, sums[r][c]);
      });
      top.store(s.top + c * kLanes);
    });
  }

  // The constants of `power`, in memory, because all registers are in use.
  struct alignas(64) Constants {
    float table[16];   // 2^(i / 16), minus i << 19 as an integer
    Element order[32]; // interleaves two vectors
    float least, whole, slope;
  };
  static const Constants* constants() {
    static const Constants made = [] {
      Constants c;
      for (int i = 0; i < 16; ++i) {
        const float x = static_cast<float>(std::exp2(i / 16.0));
        int32_t bits;
        std::memcpy(&bits, &x, 4);
        bits -= i << 19;
        std::memcpy(&c.table[i], &bits, 4);
        c.order[2 * i] = static_cast<Element>(i), c.order[2 * i + 1] = static_cast<Element>(i + 16);
      }
      c.least = -127, c.whole = 12582912.0f / 16, c.slope = 0.693147181f;
      return c;
    }();
    const Constants* hidden = &made;
    asm("" : "+r"(hidden));  // or the compiler would keep them in registers
    return hidden;
  }

  // 2^x for x ≤ kSlack, with a relative error of less than 2.4e-4; exact for whole x; 0 for x ≤ -127. x is split into
  // a whole number of sixteenths, whose power is from a table, with the exponent added as an integer, and a small rest.
  static VLPACK_INLINE __m512 power(const Constants* k, __m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(k->least), x);
    __m512 t = _mm512_add_ps(x, _mm512_set1_ps(k->whole));
    x = _mm512_sub_ps(x, _mm512_sub_ps(t, _mm512_set1_ps(k->whole)));
    __m512i p = _mm512_permutexvar_epi32(_mm512_castps_si512(t), _mm512_load_si512(k->table));
    p = _mm512_add_epi32(p, _mm512_slli_epi32(_mm512_castps_si512(t), 19));
    const __m512 y = _mm512_castsi512_ps(p);
    return _mm512_fmadd_ps(_mm512_mul_ps(y, _mm512_set1_ps(k->slope)), x, y);
  }

  // Half of a block's weights for one vector of queries: exponentials of scores minus `largest`, whose sum is added.
  struct Part {
    const float *scores, *largest;
    float* sum;
    Element* to;

    template <int Columns>
    Part(const Scratch<Columns>& s, int column, int half, Element* weights)
        : scores(s.scores + (column * kPairs + half * kPart) * 2 * kLanes), largest(s.largest + column * kLanes),
          sum(s.sum + column * kLanes), to(weights + (half * kPart * Columns + column) * kLanes * 2) {}

    // Computes the weights of the next two keys.
    template <int Columns>
    VLPACK_INLINE void next(const Constants* k) {
      const __m512 a = power(k, _mm512_sub_ps(_mm512_load_ps(scores), _mm512_load_ps(largest)));
      const __m512 added = _mm512_add_ps(a, _mm512_load_ps(sum));
      const __m512 b = power(k, _mm512_sub_ps(_mm512_load_ps(scores + kLanes), _mm512_load_ps(largest)));
      _mm512_store_ps(sum, _mm512_add_ps(added, b));
      const __m512i joined = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(k->order), joined));
      scores += 2 * kLanes, to += Columns * kLanes * 2;
    }
  };

  // Adds to kRows channels of the weighted values those of `pairs` pairs of keys. If there is a part, of weights of the
  // next block, there are kPairs, and it is computed meanwhile.
  template <int Columns, class... Parts>
  static VLPACK_INLINE void weigh(
      const Element* weights, const Element* v, int64_t pairs, float* values, Parts... part) {
    constexpr int kStep = Columns * kLanes * 2;
    Floats sums[kRows][Columns];
    each<kRows>([&](auto r) VLPACK_BODY {
      each<Columns>([&](auto c) VLPACK_BODY { sums[r][c] = Floats::load(values + (r * Columns + c) * kLanes); });
    });
    if constexpr (sizeof...(part)) {
      const Constants* const k = constants();
      for (int i = 0; i < kPart; ++i) {
        step<Columns, kRows>(v, 2, weights, sums);
        (part.template next<Columns>(k), ...);
        step<Columns, kRows>(v + kTile, 2, weights + kStep, sums);
        v += 2 * kTile, weights += 2 * kStep;
      }
    } else {
      for (; pairs >= kUnroll; pairs -= kUnroll) {
        each<kUnroll>([&](auto i) VLPACK_BODY { step<Columns, kRows>(v + i * kTile, 2, weights + i * kStep, sums); });
        v += kUnroll * kTile, weights += kUnroll * kStep;
      }
      for (; pairs > 0; --pairs) {
        step<Columns, kRows>(v, 2, weights, sums);
        v += kTile, weights += kStep;
      }
    }
    each<kRows>([&](auto r) VLPACK_BODY {
      each<Columns>([&](auto c) VLPACK_BODY { sums[r][c].store(values + (r * Columns + c) * kLanes); });
    });
  }

  template <int Columns>
  static void run_block(const Task& t) {
    constexpr int kWidth = Columns * kLanes;
    const Attention& a = t.a;
    const int64_t count = std::min<int64_t>(kWidth, t.count), some = t.keys[count - 1];
    const Scratch<Columns> s(a);
    turn_queries<Columns>(t, s, count);
    std::memset(s.values, 0, sizeof(float) * tiles(a) * kRows * kWidth);
    for (int i = 0; i < kWidth; ++i) s.largest[i] = kHidden, s.sum[i] = 0;

    Element *weights = s.weights, *next = s.weights2;  // of the block before, and of this one
    const Element* v = t.v;                            // of the block before
    auto tile_of = [&](int64_t tile) { return s.values + tile * kRows * kWidth; };
    for (int64_t start = 0; start < some; start += kBlock) {
      const int64_t keys = std::min<int64_t>(kBlock, some - start);
      const bool rescale = score_block<Columns>(t, s, start, keys);
      const int halves = keys > kBlock / 2 ? 2 : 1, parts = Columns * halves;
      int part = 0;
      if (start > 0) {
        int64_t tile = 0;
        for (; tile < tiles(a) && part < parts; ++tile, ++part)
          weigh<Columns>(weights, v + tile * kPairs * kTile, kPairs, tile_of(tile),
                         Part(s, part / halves, part % halves, next));
        for (; tile < tiles(a); ++tile) weigh<Columns>(weights, v + tile * kPairs * kTile, kPairs, tile_of(tile));
        v += block_room(a);
      }
      for (; part < parts; ++part) {
        Part rest(s, part / halves, part % halves, next);
        for (int i = 0; i < kPart; ++i) rest.template next<Columns>(constants());
      }
      if (rescale && start > 0)
        for (int64_t d = 0; d < a.size; ++d)
          for (int c = 0; c < kWidth; c += kLanes) {
            float* const value = s.values + d * kWidth + c;
            (Floats::load(value) * Floats::load(s.shrink + c)).store(value);
          }
      std::swap(weights, next);
    }
    const int64_t left = some - (some - 1) / kBlock * kBlock;  // keys of the last block
    for (int64_t tile = 0; some > 0 && tile < tiles(a); ++tile)
      weigh<Columns>(weights, v + tile * kPairs * kTile, (left + 1) / 2, tile_of(tile));
    write<Columns>(t, s, count, some > 0);
  }

  // The scores of a block of keys, and the new largest ones. Whether values have to be rescaled.
  template <int Columns>
  static bool score_block(const Task& t, const Scratch<Columns>& s, int64_t start, int64_t keys) {
    const Element* const these = t.k + start * t.k_row;
    std::memcpy(s.top, s.largest, sizeof(float) * Columns * kLanes);
    int64_t row = 0;
    for (; row + kRows <= keys; row += kRows) score<Columns, kRows>(t, s, these, row);
    if (row < keys && keys >= kRows) score<Columns, kRows>(t, s, these, keys - kRows);
    else for (; row < keys; ++row) score<Columns, 1>(t, s, these, row);
    for (int c = 0; c < Columns; ++c)  // pads the block with keys that get no weight
      for (row = keys; row < kBlock; ++row) Floats::all(kHidden).store(s.scores + (c * kBlock + row) * kLanes);
    if (start + keys > t.keys[0]) hide<Columns>(t, s, start, std::max<int64_t>(t.keys[0] - start, 0), keys);
    bool rescale = false;
    for (int c = 0; c < Columns * kLanes; c += kLanes) {
      // each lane decides by itself, so that the result of a query does not depend on its neighbours
      const Floats largest = Floats::load(s.largest + c), above = largest + Floats::all(kSlack);
      const Floats top = Floats::load(s.top + c);
      rescale |= Floats::any_less(above, top);
      const Floats chosen = Floats::where_less(above, top, top, largest), shrink = exp2<6>(largest - chosen);
      chosen.store(s.largest + c), shrink.store(s.shrink + c);
      (Floats::load(s.sum + c) * shrink).store(s.sum + c);
    }
    return rescale;
  }

  // Hides rows from … keys of a block of scores from the queries that do not attend to them, finds the largest of the
  // others again.
  template <int Columns>
  static void hide(const Task& t, const Scratch<Columns>& s, int64_t start, int64_t from, int64_t keys) {
    for (int c = 0; c < Columns; ++c) {
      alignas(64) float limits[kLanes];
      for (int i = 0; i < kLanes; ++i) limits[i] = static_cast<float>(t.keys[c * kLanes + i] - start);
      const Floats limit = Floats::load(limits);
      float* const scores = s.scores + c * kBlock * kLanes;
      for (int64_t row = from; row < keys; ++row)
        Floats::where_less(Floats::all(static_cast<float>(row)), limit, Floats::load(scores + row * kLanes),
                           Floats::all(kHidden)).store(scores + row * kLanes);
      Floats top = Floats::load(s.largest + c * kLanes);
      for (int64_t row = 0; row < keys; ++row) top = Floats::max(top, Floats::load(scores + row * kLanes));
      top.store(s.top + c * kLanes);
    }
  }

  // Transposes queries, scaled so that differences of scores are exponents of base 2, and rounds them.
  template <int Columns>
  static void turn_queries(const Task& t, const Scratch<Columns>& s, int64_t count) {
    const Attention& a = t.a;
    const Floats factor = Floats::all(a.scale * 1.44269504f);
    for (int c = 0; c < Columns; ++c)
      for (int64_t d = 0; d < a.size; d += 2 * kLanes) {
        __m512 rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = _mm512_setzero_ps();
          const int64_t query = c * kLanes + i;
          if (query >= count) continue;
          const float* const from = t.q + t.place[query] + d;
          const Floats low = load_some(from, a.size - d) * factor;
          const Floats high = a.size - d > kLanes ? load_some(from + kLanes, a.size - d - kLanes) * factor : Floats::all(0);
          rows[i] = (__m512)_mm512_cvtne2ps_pbh(high.v, low.v);
        }
        transpose(rows);
        Element* const to = s.queries + (d / 2 * Columns + c) * kLanes * 2;
        for (int i = 0; i < kLanes; ++i) _mm512_store_ps(to + i * Columns * kLanes * 2, rows[i]);
      }
  }

  // Divides values by the sums of weights, and transposes them to the output.
  template <int Columns>
  static void write(const Task& t, const Scratch<Columns>& s, int64_t count, bool any) {
    const Attention& a = t.a;
    for (int c = 0; c < Columns; ++c) {
      const Floats factor = Floats::all(1) / (any ? Floats::load(s.sum + c * kLanes) : Floats::all(1));
      for (int64_t d = 0; d < a.size; d += kLanes) {
        __m512 rows[kLanes];
        for (int i = 0; i < kLanes; ++i)
          rows[i] = (Floats::load(s.values + ((d + i) * Columns + c) * kLanes) * factor).v;
        transpose(rows);
        for (int i = 0; i < kLanes && c * kLanes + i < count; ++i)
          store_some({rows[i]}, t.out + t.place[c * kLanes + i] + d, a.size - d);
      }
    }
  }
};

}  // namespace
}  // namespace vlpack

#endif
