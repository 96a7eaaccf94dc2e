// The layout of keys and values in bfloat16 for attention_brain.h, and packing to it.
#pragma once

#ifdef __AVX512BF16__

#include <algorithm>

#include "attention_kernel.h"

namespace vlpack {
namespace {

// A step of a product takes two elements of the direction of the sum. So keys are packed to [keys, steps, 2], and
// values to [blocks of keys, tiles, kPairs, kRows, 2], which is the order in which they are read. Keys that are in this form
// already are used where they are.
struct PackBrain {
  using Element = uint16_t;
  static constexpr int kPairs = kBlock / 2;  // steps of a sum over the keys of a block
  static constexpr int kTile = kRows * 2;    // elements of one step of a tile of values
  static constexpr int64_t kTogether = 256;  // keys that one task packs; a multiple of kBlock
  static constexpr int64_t kAhead = 16;      // by how many rows keys and values are fetched in advance

  static int64_t steps(const Attention& a) { return (a.size + 1) / 2; }              // of a sum over channels
  static int64_t tiles(const Attention& a) { return (a.size + kRows - 1) / kRows; }  // of values

  static bool packs_keys(const Attention& a) { return !a.narrow || a.size % 2; }
  static int64_t key_room(const Attention& a) { return packs_keys(a) ? a.keys * steps(a) * 2 : 0; }
  static int64_t block_room(const Attention& a) { return tiles(a) * kPairs * kTile; }  // of values
  static int64_t value_room(const Attention& a) { return (a.keys + kBlock - 1) / kBlock * block_room(a); }
  static int64_t head_room(const Attention& a) { return key_room(a) + value_room(a); }
  static int64_t room(const Attention& a) {
    return a.batch * a.heads * head_room(a) * static_cast<int64_t>(sizeof(Element));
  }

  static int64_t pack_tasks_per_head(const Attention& a) { return (a.keys + kTogether - 1) / kTogether; }
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
  static VLPACK_INLINE __mmask16 lanes(int64_t count) {
    return count >= kLanes ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
  }

  template <class Source>
  static void pack_from(const Attention& a, const Source* keys, const Source* values, void* room, int64_t task) {
    const int64_t per_head = pack_tasks_per_head(a), head = task / per_head, begin = task % per_head * kTogether;
    const int64_t end = std::min(begin + kTogether, a.keys), width = steps(a) * 2, from = keys_place(a, head);
    Element* k = static_cast<Element*>(room) + head * head_room(a);
    Element* v = k + key_room(a);
    if (packs_keys(a))
      for (int64_t row = begin; row < end; ++row) {
        const Source* source = keys + from + row * a.k_row;
        expect(source + kAhead * a.k_row, a.size);
        for (int64_t d = 0; d < width; d += kLanes)
          _mm256_mask_storeu_epi16(k + row * width + d, lanes(width - d), narrow(source + d, lanes(a.size - d)));
      }
    for (int64_t row = begin; row < end; row += 2) {
      const Source* even = values + from + row * a.k_row;
      const Source* odd = row + 1 < a.keys ? even + a.k_row : nullptr;
      expect(even + kAhead * a.k_row, a.size), expect(even + (kAhead + 1) * a.k_row, a.size);
      Element* to = v + row / kBlock * block_room(a) + row % kBlock / 2 * kTile;
      for (int64_t d = 0; d < a.size; d += kLanes) {
        const __mmask16 some = lanes(a.size - d);
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
};

}  // namespace
}  // namespace vlpack

#endif
