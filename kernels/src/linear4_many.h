// Products by 4-bit matrices and many rows, for the instruction set that the including file is compiled for.
//
// A task turns some panels of the matrix into panels of an 8-bit matrix and multiplies by these. If blocks have less than
// 128 columns, it rounds the matrix to 8 bits with a scale for each wide block: a step is 1/120 of the largest number
// that a wide block can have, and small beside the steps of 4 bits. Rows of x are quantized in wide blocks then, too. A
// code has 16 values, which are rounded once for each block and then looked up.
#pragma once

#include "linear4_few.h"
#include "linear8_kernel.h"

namespace vlpack {
namespace {

// The number of columns of a wide block. More are faster and coarser; calibrated packages have blocks of 64 and more.
constexpr int64_t wide_block(int64_t block) { return block >= 128 ? block : block == 64 ? 128 : 256; }

// The largest of each `count` = 1, 2, 4, 8 or 16 adjacent lanes, in all of these lanes. No lane is negative; NaN counts
// as larger than all numbers.
VLPACK_INLINE Floats largest_of(Floats x, int64_t count) {
#ifdef __AVX512F__
  __m512i v = _mm512_castps_si512(x.v);
  if (count > 1) v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
  if (count > 2) v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
  if (count > 4) v = _mm512_max_epi32(v, _mm512_shuffle_i64x2(v, v, _MM_PERM_CDAB));
  if (count > 8) v = _mm512_max_epi32(v, _mm512_shuffle_i64x2(v, v, _MM_PERM_BADC));
  return {_mm512_castsi512_ps(v)};
#else
  __m256i v = _mm256_castps_si256(x.v);
  if (count > 1) v = _mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0xb1));
  if (count > 2) v = _mm256_max_epi32(v, _mm256_shuffle_epi32(v, 0x4e));
  if (count > 4) v = _mm256_max_epi32(v, _mm256_permute2x128_si256(v, v, 1));
  return {_mm256_castsi256_ps(v)};
#endif
}

// The lower half of each lane in both halves.
VLPACK_INLINE Sums twice(Sums x) {
#ifdef __AVX512F__
  return {_mm512_or_si512(_mm512_slli_epi32(x.v, 16), _mm512_and_si512(x.v, _mm512_set1_epi32(0xffff)))};
#else
  return {_mm256_or_si256(_mm256_slli_epi32(x.v, 16), _mm256_and_si256(x.v, _mm256_set1_epi32(0xffff)))};
#endif
}

// The largest magnitude of a code. It is a multiple of 8, 10, 12 and 15, which the largest difference from a zero point
// often is, so that the codes of the block with the largest numbers are exact: with 127, ties would be common.
constexpr float kSteps = 120;

// Ratios are stored in steps of 2⁻¹⁰ and 4-bit codes in steps of 2⁻⁵, so the upper half of a product, rounded, is a code.
constexpr float kRatio = 1024;
constexpr int kCode = 32;

// The 8-bit code around 128 of a 4-bit code, for the scaled ratio and zero point of its block.
[[maybe_unused]] VLPACK_INLINE uint8_t code_of(int code, int32_t ratio, int32_t zero) {
  const int32_t product = static_cast<int16_t>(ratio) * static_cast<int16_t>(code * kCode - static_cast<int16_t>(zero));
  return static_cast<uint8_t>(128 + ((product >> 14) + 1 >> 1));
}

#ifdef __AVX512F__

// Transposes 16 vectors of 16 lanes and stores them: lane `row` of the vector `lane` at to + 64 · place(lane).
template <class Place>
VLPACK_INLINE void store_transposed(const __m512i (&rows)[16], uint8_t* to, const Place& place) {
  __m512i pairs[16], fours[16];
  each<8>([&](auto i) VLPACK_BODY {
    pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  each<4>([&](auto i) VLPACK_BODY {  // fours[4 i + k]: lanes k, 4 + k, 8 + k, 12 + k of the rows 4 i … 4 i + 3
    fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  each<4>([&](auto k) VLPACK_BODY {
    const __m512i a = _mm512_shuffle_i32x4(fours[k], fours[4 + k], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(fours[k], fours[4 + k], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(fours[8 + k], fours[12 + k], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(fours[8 + k], fours[12 + k], 0xee);
    _mm512_storeu_si512(to + 64 * place(k), _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + 64 * place(4 + k), _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(to + 64 * place(8 + k), _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + 64 * place(12 + k), _mm512_shuffle_i32x4(b, d, 0xdd));
  });
}

#endif

struct Many {
  static constexpr int kLanes = kLanes4;

  // The product as one by an 8-bit matrix, still without the matrix.
  static Linear8 wide(const Linear4& l) {
    Linear8 w{};
    static_cast<Product&>(w) = l;
    w.block = wide_block(l.block);
    return w;
  }

  static int64_t room(const Linear4& l) { return Multiply8::room(wide(l)); }
  static int64_t packs(const Linear4& l) { return Multiply8::packs(wide(l)); }
  static void pack(const Linear4& l, void* room, int64_t task) { Multiply8::pack(wide(l), room, task); }
  static int64_t tasks(const Linear4& l) { return Multiply8::tasks(wide(l)); }

  static void run(const Linear4& l, const void* room, int64_t task) {
    Linear8 w = wide(l);
    const int64_t panels = Multiply8::task_panels(w), bytes = Multiply8::panel_bytes(w);
    uint8_t* const start = scratch<uint8_t, 2>(panels * bytes + 64);
    uint8_t* const codes = start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64;
    float* const scales = scratch<float, 3>(panels * w.blocks() * kLanes);
    w.first = task * panels, w.codes = codes, w.scales = scales;
    const int64_t last = std::min(Multiply8::panels(w), w.first + panels);
    for (int64_t panel = w.first; panel < last; ++panel) {
      const int64_t index = panel - w.first;
      round_panel(l, panel, w, codes + index * bytes, scales + index * w.blocks() * kLanes);
    }
    Multiply8::run(w, room, task);
  }

  // Turns kLanes rows of the matrix into a panel of an 8-bit matrix w: codes [columns / 4, kLanes, 4] and scales [wide
  // blocks, kLanes]. If the blocks of w are those of l, this is exact.
  static void round_panel(const Linear4& l, int64_t panel, const Linear8& w, uint8_t* codes, float* scales) {
    const int64_t count = w.block / l.block, wides = w.blocks(), room = wides * count + kLanes;
    Blocks blocks;
    blocks.room = room;
    blocks.ratios = scratch<int32_t, 4>(2 * kLanes * room);
    blocks.zeros = blocks.ratios + kLanes * room;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t row = panel * kLanes + lane;
      int32_t* const ratio = blocks.ratios + lane * room;
      int32_t* const zero = blocks.zeros + lane * room;
      const auto left = [&](int64_t b) { return row < l.rows ? std::clamp<int64_t>(l.blocks - b, 0, kLanes) : 0; };
      const auto zeros = [&](int64_t b) VLPACK_BODY { return left(b) ? zeros_of(l, row, b) : Floats::all(0); };
      const auto scale = [&](int64_t b) VLPACK_BODY { return load_some(l.scales + row * l.blocks + b, left(b)); };
      const auto most = [&](int64_t b) VLPACK_BODY {  // the largest magnitude that a number of each block can have
        return scale(b).abs() * Floats::max(zeros(b), Floats::all(15) - zeros(b));
      };
      const int64_t step = std::max<int64_t>(count, kLanes);
      for (int64_t begin = 0; begin < wides * count; begin += step) {
        alignas(64) float tops[kLanes];
        Floats top = largest_of(most(begin), count);  // of each wide block
        if (count > kLanes) top = Floats::max(top, largest_of(most(begin + kLanes), count));
        (count == 1 ? scale(begin) : top).store(tops);
        const Floats inverse = Floats::all(kSteps) / top, limit = Floats::all(3e38f);
        for (int64_t b = begin; b < begin + step; b += kLanes) {
          // 0 if the numbers of a wide block are all 0, too small to be inverted, or not finite
          const Floats none = Floats::all(0), ratios = scale(b) * inverse * Floats::all(kRatio);
          const Floats usable = Floats::where_less(inverse, limit, ratios, none);
          const Floats exact = Floats::all(kRatio);
          twice(integers(count == 1 ? exact : Floats::where_less(top, limit, usable, none))).store(ratio + b);
          twice(integers(zeros(b) * Floats::all(kCode))).store(zero + b);
        }
        for (int64_t i = 0; i < kLanes && begin + i < wides * count; i += count)
          scales[(begin + i) / count * kLanes + lane] = count == 1 ? tops[i] : tops[i] / kSteps;
      }
    }
    for (int64_t chunk = 0; chunk < wides * w.block / kChunk4; ++chunk)
      round_chunk(l, panel * kLanes, chunk, blocks, codes + chunk * kChunk4 * kLanes);
  }

  // The scaled ratios of the scales of blocks to those of wide blocks, and zero points, [kLanes, room]; each is stored in
  // both halves of 32 bits.
  struct Blocks {
    int32_t *ratios, *zeros;
    int64_t room;
  };

  // Rounds kChunk4 columns of a panel, whose first row is `row`.
  static VLPACK_INLINE void round_chunk(
      const Linear4& l, int64_t row, int64_t chunk, const Blocks& blocks, uint8_t* to) {
    const bool exists = chunk < chunks_of(l);
    const int64_t first = chunk * kChunk4 / l.block;
#ifdef __AVX512F__
    // the indices of the blocks to which the 16 bytes of each 128 bits of a vector belong, which are 32 columns
    const int parts = parts_of(l), shift = parts == 8 ? 1 : parts == 4 ? 0 : parts == 2 ? -1 : -2;
    const __m512i groups = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i places = shift > 0 ? _mm512_slli_epi32(groups, 1) : _mm512_srli_epi32(groups, -shift);
    const __m512i mask = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(-128);
    const __m128i eight = _mm_set_epi16(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i small = _mm512_broadcast_i32x4(_mm_slli_epi16(eight, 5));
    const __m512i large = _mm512_add_epi16(small, _mm512_set1_epi16(8 * kCode));
    __m512i low[16], high[16];
    for (int lane = 0; lane < 16; ++lane) {
      const __m256i* const ratios = reinterpret_cast<const __m256i*>(blocks.ratios + lane * blocks.room + first);
      const __m256i* const zeros = reinterpret_cast<const __m256i*>(blocks.zeros + lane * blocks.room + first);
      const __m512i all_ratios = _mm512_castsi256_si512(_mm256_loadu_si256(ratios));
      const __m512i all_zeros = _mm512_castsi256_si512(_mm256_loadu_si256(zeros));
      const auto table = [&](__m512i place) VLPACK_BODY {  // 16 bytes for each of four groups of 32 columns
        const __m512i ratio = _mm512_permutexvar_epi32(place, all_ratios);
        const __m512i zero = _mm512_permutexvar_epi32(place, all_zeros);
        const __m512i codes = _mm512_packs_epi16(_mm512_mulhrs_epi16(_mm512_sub_epi16(small, zero), ratio),
                                                 _mm512_mulhrs_epi16(_mm512_sub_epi16(large, zero), ratio));
        return _mm512_xor_si512(codes, middle);
      };
      const bool real = exists && row + lane < l.rows;
      const __m512i packed = real ? _mm512_loadu_si512(codes_of(l, row + lane, chunk)) : _mm512_setzero_si512();
      const __m512i even_codes = _mm512_and_si512(packed, mask);
      const __m512i odd_codes = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
      const __m512i codes = table(places);
      __m512i even = _mm512_shuffle_epi8(codes, even_codes), odd = _mm512_shuffle_epi8(codes, odd_codes);
      if (parts == 8) {  // the last 8 bytes of each 16 belong to the next block
        const __m512i next = table(_mm512_add_epi32(places, _mm512_set1_epi32(1)));
        const __mmask64 last = 0xff00ff00ff00ff00;
        even = _mm512_mask_shuffle_epi8(even, last, next, even_codes);
        odd = _mm512_mask_shuffle_epi8(odd, last, next, odd_codes);
      }
      low[lane] = _mm512_unpacklo_epi8(even, odd), high[lane] = _mm512_unpackhi_epi8(even, odd);
    }
    store_transposed(low, to, [](int step) VLPACK_BODY { return step / 4 * 8 + step % 4; });
    store_transposed(high, to, [](int step) VLPACK_BODY { return step / 4 * 8 + 4 + step % 4; });
#else
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for (int64_t column = 0; column < kChunk4; ++column) {
        const int64_t at = lane * blocks.room + first + column / l.block;
        const bool real = exists && row + lane < l.rows;
        const int code = real ? codes_of(l, row + lane, chunk)[column / 2] >> column % 2 * 4 & 15 : 0;
        to[(column / 4 * kLanes + lane) * 4 + column % 4] = code_of(code, blocks.ratios[at], blocks.zeros[at]);
      }
#endif
  }
};

}  // namespace
}  // namespace vlpack
