// Attention with products of bfloat16 numbers, which are summed in fp32, for many queries.
//
// It is the algorithm of attention_kernel.h, with two differences. A step of a product takes two elements of the
// direction of the sum, so both operands hold pairs. And the weighted values of a block are summed after the scores of
// the next block: between these products, which keep the units for multiplication busy, other units compute the next
// block's exponentials.
#pragma once

#ifdef __AVX512BF16__

#include <algorithm>
#include <cstring>
#include <utility>

#include "attention_brain_pack.h"
#include "transpose.h"
#include "unroll.h"

namespace vlpack {
namespace {

struct AttendBrain : PackBrain {
  static constexpr int kMost = Floats::kColumns;  // vectors of queries of one task
  static constexpr int kPart = kPairs / 2;        // pairs of keys whose weights are computed during one tile of values
  static constexpr int kUnroll = 2;               // steps between two branches

  static int64_t vectors(const Attention& a) { return (a.queries * a.group + kLanes - 1) / kLanes; }
  static int64_t blocks(const Attention& a) { return (vectors(a) + kMost - 1) / kMost; }
  static int64_t tasks(const Attention& a) { return a.batch * a.heads * blocks(a); }

  static void run(const Attention& a, const void* room, int64_t task) {
    // later blocks attend to more keys, so they come first
    const int64_t per_head = blocks(a), head = task / per_head, block = per_head - 1 - task % per_head;
    // a single last vector is slow, so the last two tasks have two vectors each, and not three and one
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
    int64_t k_row;                  // distance of two keys
    const float* q;                 // the first query of the key head, and its output
    float* out;
    int64_t place[kMost * kLanes];  // distances of the queries from it
    int64_t keys[kMost * kLanes];   // how many keys they attend to

    Task(const Attention& a, const void* room, int64_t head, int64_t begin) : a(a) {
      const Element* packed = static_cast<const Element*>(room) + head * head_room(a);
      const int64_t first = begin * kLanes;
      k = packs_keys(a) ? packed : static_cast<const Element*>(a.k) + keys_place(a, head);
      v = packed + key_room(a), k_row = packs_keys(a) ? steps(a) * 2 : a.k_row;
      q = a.q + queries_place(a, head), out = a.out + queries_place(a, head);
      const int64_t count = a.queries * a.group - first;
      int64_t token = first / a.group, member = first % a.group;  // divisions are slow, so there are only these
      for (int i = 0; i < kMost * kLanes; ++i) {
        place[i] = token * a.q_row + member * a.q_head, keys[i] = std::min(a.keys, a.visible + token);
        if (i + 1 >= count) continue;  // the last query is repeated, so that vectors are full
        if (++member == a.group) ++token, member = 0;
      }
    }
  };

  // The scratch memory of a task with Columns vectors of queries.
  template <int Columns>
  struct Scratch {
    Element* queries;             // [steps, Columns, kLanes, 2]
    float* scores;                // [Columns, kBlock, kLanes]
    Element *weights, *spare;     // exponentials of two blocks, [kPairs, Columns, kLanes, 2]
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
      spare = reinterpret_cast<Element*>(take(kWidth * kPairs));
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

  // One step of a tile of Count rows, whose pairs are `row` elements apart, without the first Skip columns.
  template <int Columns, int Skip, int Count>
  static VLPACK_INLINE void step(
      const Element* rows, int64_t row, const Element* packed, Floats (&sums)[Count][Columns - Skip]) {
    __m512 operand[Columns - Skip];
    each<Columns - Skip>([&](auto c) VLPACK_BODY { operand[c] = _mm512_loadu_ps(packed + (Skip + c) * kLanes * 2); });
    each<Count>([&](auto r) VLPACK_BODY {
      each<Columns - Skip>([&](auto c) VLPACK_BODY { sums[r][c] = dot(rows + r * row, operand[c], sums[r][c]); });
    });
  }

  // Scores of Count keys, from row `at` of a block on; raises `top` to the largest.
  template <int Columns, int Skip, int Count>
  static void score(const Task& t, const Scratch<Columns>& s, const Element* keys, int64_t at) {
    constexpr int kStep = Columns * kLanes * 2;
    const int64_t row = t.k_row;
    const Element *rows = keys + at * row, *queries = s.queries;
    Floats sums[Count][Columns - Skip];
    each<Count>([&](auto r) VLPACK_BODY {
      each<Columns - Skip>([&](auto c) VLPACK_BODY { sums[r][c] = Floats::all(0); });
    });
    int64_t left = steps(t.a);
    for (; left >= kUnroll; left -= kUnroll) {
      each<kUnroll>([&](auto i) VLPACK_BODY { step<Columns, Skip>(rows + i * 2, row, queries + i * kStep, sums); });
      rows += kUnroll * 2, queries += kUnroll * kStep;
    }
    for (; left > 0; --left) {
      step<Columns, Skip>(rows, row, queries, sums);
      rows += 2, queries += kStep;
    }
    each<Columns - Skip>([&](auto c) VLPACK_BODY {
      float *const scores = s.scores + ((Skip + c) * kBlock + at) * kLanes, *const place = s.top + (Skip + c) * kLanes;
      Floats top = Floats::load(place);
      each<Count>([&](auto r) VLPACK_BODY {
        sums[r][c].store(scores + r * kLanes);
        top = Floats::max(top, sums[r][c]);
      });
      top.store(place);
    });
  }

  // The constants of `power`, in memory, because all registers are in use.
  struct alignas(64) Constants {
    float table[16];    // 2^(i / 16), minus i << 19 as an integer
    Element order[32];  // interleaves two vectors
    float least;        // power of which is 0
    float whole;        // to which numbers are added to round them to sixteenths
    float slope;        // ln(2)
  };
  static const Constants* constants() {
    // in a function, because initialization while the library is loaded could need instructions that are missing
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
    asm("" : "+r"(hidden));  // so that the compiler does not load them before the loop
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
      const __m512 b = power(k, _mm512_sub_ps(_mm512_load_ps(scores + kLanes), _mm512_load_ps(largest)));
      _mm512_store_ps(sum, _mm512_add_ps(_mm512_add_ps(a, b), _mm512_load_ps(sum)));
      const __m512i joined = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(k->order), joined));
      scores += 2 * kLanes, to += Columns * kLanes * 2;
    }
  };

  // Adds to kRows channels of the weighted values those of `pairs` pairs of keys, without the first Skip columns. If
  // there is a part, of weights of the next block, there are kPairs, and it is computed meanwhile.
  template <int Columns, int Skip, class... Parts>
  static VLPACK_INLINE void weigh(
      const Element* weights, const Element* v, int64_t pairs, float* values, Parts... part) {
    constexpr int kStep = Columns * kLanes * 2;
    Floats sums[kRows][Columns - Skip];
    each<kRows>([&](auto r) VLPACK_BODY {
      each<Columns - Skip>(
          [&](auto c) VLPACK_BODY { sums[r][c] = Floats::load(values + (r * Columns + Skip + c) * kLanes); });
    });
    if constexpr (sizeof...(part)) {
      const Constants* const k = constants();
      for (int i = 0; i < kPart; ++i) {
        step<Columns, Skip>(v, 2, weights, sums);
        (part.template next<Columns>(k), ...);
        step<Columns, Skip>(v + kTile, 2, weights + kStep, sums);
        v += 2 * kTile, weights += 2 * kStep;
      }
    } else {
      for (; pairs >= kUnroll; pairs -= kUnroll) {
        each<kUnroll>([&](auto i) VLPACK_BODY { step<Columns, Skip>(v + i * kTile, 2, weights + i * kStep, sums); });
        v += kUnroll * kTile, weights += kUnroll * kStep;
      }
      for (; pairs > 0; --pairs) {
        step<Columns, Skip>(v, 2, weights, sums);
        v += kTile, weights += kStep;
      }
    }
    each<kRows>([&](auto r) VLPACK_BODY {
      each<Columns - Skip>(
          [&](auto c) VLPACK_BODY { sums[r][c].store(values + (r * Columns + Skip + c) * kLanes); });
    });
  }

  // Columns vectors of queries.
  template <int Columns>
  static void run_block(const Task& t) {
    constexpr int kWidth = Columns * kLanes;
    const Attention& a = t.a;
    const int64_t some = t.keys[kWidth - 1];  // keys of the last query
    const Scratch<Columns> s(a);
    turn_queries<Columns>(t, s);
    std::memset(s.values, 0, sizeof(float) * tiles(a) * kRows * kWidth);
    for (int i = 0; i < kWidth; ++i) s.largest[i] = kHidden, s.sum[i] = 0;

    Element *weights = s.weights, *next = s.spare;  // of the block before, and of this one
    const Element* v = t.v;                            // of the block before
    for (int64_t start = 0; start < some; start += kBlock) {
      const int64_t keys = std::min<int64_t>(kBlock, some - start);
      const bool rescale = score_block<Columns>(t, s, start, keys);
      const int halves = keys > kBlock / 2 ? 2 : 1, parts = Columns * halves;
      int part = 0;
      auto next_part = [&] { return Part(s, part / halves, part % halves, next); };
      if (start > 0) {
        float* values = s.values;
        for (int64_t tile = 0; tile < tiles(a); ++tile, v += kPairs * kTile, values += kRows * kWidth) {
          if (part < parts) {
            weigh<Columns, 0>(weights, v, kPairs, values, next_part());
            ++part;
          } else {
            weigh<Columns, 0>(weights, v, kPairs, values);
          }
        }
        if (rescale) rescale_values<Columns>(t, s);
      }
      for (; part < parts; ++part) {
        Part rest = next_part();
        const Constants* const k = constants();
        for (int i = 0; i < kPart; ++i) rest.template next<Columns>(k);
      }
      std::swap(weights, next);
    }
    // of the last block, every column has as many keys as its last query attends to
    const int64_t start = (some - 1) / kBlock * kBlock;
    for (int64_t tile = 0; some > 0 && tile < tiles(a); ++tile, v += kPairs * kTile) {
      float* const values = s.values + tile * kRows * kWidth;
      int64_t done = 0;
      each<Columns>([&](auto c) VLPACK_BODY {
        const int64_t pairs = (t.keys[c * kLanes + kLanes - 1] - start + 1) / 2;
        if (pairs <= done) return;
        weigh<Columns, c>(weights + done * kWidth * 2, v + done * kTile, pairs - done, values);
        done = pairs;
      });
    }
    write<Columns>(t, s, some > 0);
  }

  // Rescales the weighted values.
  template <int Columns>
  static void rescale_values(const Task& t, const Scratch<Columns>& s) {
    for (int64_t d = 0; d < t.a.size; ++d)
      for (int c = 0; c < Columns * kLanes; c += kLanes) {
        float* const value = s.values + d * Columns * kLanes + c;
        (Floats::load(value) * Floats::load(s.shrink + c)).store(value);
      }
  }

  // The scores of a block of keys, and the new largest ones. Whether values have to be rescaled.
  template <int Columns>
  static bool score_block(const Task& t, const Scratch<Columns>& s, int64_t start, int64_t keys) {
    const Element* const these = t.k + start * t.k_row;
    std::memcpy(s.top, s.largest, sizeof(float) * Columns * kLanes);
    int64_t row = 0;
    // columns of which no query attends to a row are skipped
    each<Columns>([&](auto c) VLPACK_BODY {
      const int64_t end = std::min(keys, t.keys[c * kLanes + kLanes - 1] - start);
      for (; row < end && row + kRows <= keys; row += kRows) score<Columns, c, kRows>(t, s, these, row);
    });
    if (row < keys && keys >= kRows) {  // the last rows again, together with those that are left
      score<Columns, 0, kRows>(t, s, these, keys - kRows);
      row = keys;
    }
    for (; row < keys; ++row) score<Columns, 0, 1>(t, s, these, row);
    for (int c = 0; c < Columns; ++c)  // pads the block with keys that get no weight
      for (row = keys; row < kBlock; ++row) Floats::all(kHidden).store(s.scores + (c * kBlock + row) * kLanes);
    if (start + keys > t.keys[0]) hide<Columns>(t, s, start, std::max<int64_t>(t.keys[0] - start, 0), keys);
    bool rescale = false;
    for (int c = 0; c < Columns * kLanes; c += kLanes) {
      // each lane decides by itself, so that the result of a query does not depend on its neighbours
      const Floats largest = Floats::load(s.largest + c), above = largest + Floats::all(kSlack);
      const Floats top = Floats::load(s.top + c);
      rescale |= Floats::any_less(above, top);
      const Floats chosen = Floats::where_less(above, top, top, largest), shrink = exp2(largest - chosen);
      chosen.store(s.largest + c), shrink.store(s.shrink + c);
      (Floats::load(s.sum + c) * shrink).store(s.sum + c);
    }
    return rescale;
  }

  // Hides rows from … keys of a block of scores from the queries that do not attend to them, and finds the largest of
  // the others.
  template <int Columns>
  static void hide(const Task& t, const Scratch<Columns>& s, int64_t start, int64_t from, int64_t keys) {
    for (int c = 0; c < Columns; ++c) {
      alignas(64) float limits[kLanes];
      for (int i = 0; i < kLanes; ++i) limits[i] = static_cast<float>(t.keys[c * kLanes + i] - start);
      const Floats limit = Floats::load(limits);
      float* const scores = s.scores + c * kBlock * kLanes;
      for (int64_t row = from; row < keys; ++row)
        Floats::where_less(Floats::all(static_cast<float>(row)), limit, Floats::load(scores + row * kLanes),
                           Floats::all(kHidden))
            .store(scores + row * kLanes);
      Floats top = Floats::load(s.largest + c * kLanes);
      for (int64_t row = 0; row < keys; ++row) top = Floats::max(top, Floats::load(scores + row * kLanes));
      top.store(s.top + c * kLanes);
    }
  }

  // Transposes queries, scaled so that differences of scores are exponents of base 2, and rounds them.
  template <int Columns>
  static void turn_queries(const Task& t, const Scratch<Columns>& s) {
    const __m512 factor = _mm512_set1_ps(t.a.scale * 1.44269504f);
    for (int c = 0; c < Columns; ++c)
      for (int64_t d = 0; d < t.a.size; d += 2 * kLanes) {
        const __mmask16 low = lanes(t.a.size - d), high = lanes(t.a.size - d - kLanes);
        Floats rows[kLanes];
        each<kLanes>([&](auto i) VLPACK_BODY {
          const float* const from = t.q + t.place[c * kLanes + i] + d;
          const __m512 left = _mm512_mul_ps(_mm512_maskz_loadu_ps(low, from), factor);
          const __m512 right = _mm512_mul_ps(_mm512_maskz_loadu_ps(high, from + kLanes), factor);
          rows[i] = {(__m512)_mm512_cvtne2ps_pbh(right, left)};
        });
        transpose(rows);
        Element* const to = s.queries + (d / 2 * Columns + c) * kLanes * 2;
        each<kLanes>([&](auto i) VLPACK_BODY { _mm512_store_ps(to + i * Columns * kLanes * 2, rows[i].v); });
      }
  }

  // Divides values by the sums of weights, and transposes them to the output.
  template <int Columns>
  static void write(const Task& t, const Scratch<Columns>& s, bool any) {
    for (int c = 0; c < Columns; ++c) {
      const Floats factor = Floats::all(1) / (any ? Floats::load(s.sum + c * kLanes) : Floats::all(1));
      for (int64_t d = 0; d < t.a.size; d += kLanes) {
        const __mmask16 some = lanes(t.a.size - d);
        const float* const from = s.values + (d * Columns + c) * kLanes;
        Floats rows[kLanes];
        each<kLanes>([&](auto i) VLPACK_BODY { rows[i] = Floats::load(from + i * Columns * kLanes) * factor; });
        transpose(rows);
        each<kLanes>([&](auto i) VLPACK_BODY {
          _mm512_mask_storeu_ps(t.out + t.place[c * kLanes + i] + d, some, rows[i].v);
        });
      }
    }
  }
};

}  // namespace
}  // namespace vlpack

#endif
