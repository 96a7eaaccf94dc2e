// The functions that exist once for each instruction set, and the choice among them.
#pragma once

#include <cstdint>

namespace vlpack {

// Attention of `queries` rows to all of `keys` rows, for `batch` sequences and `heads` heads of `size` channels.
// Rows of a sequence are `*_row` floats apart, sequences `*_batch`, and heads `*_head`.
struct Attention {
  const float *q, *k, *v;
  float* out;
  int64_t batch, heads, queries, keys, size;
  int64_t q_row, q_batch, q_head;  // of queries and outputs
  int64_t k_row, k_batch, k_head;  // of keys and values
  float scale;                     // factor of the dot products
};

// Product y = x Wᵀ of fp32 rows x [count, cols] by a 4-bit matrix W [rows, cols].
struct Linear4 {
  const uint8_t* codes;  // as `linear4_lay` laid them out; the low nibble of a byte is the first of two columns
  const float* scales;   // [rows, blocks]
  const uint8_t* zeros;  // [rows, ceil(blocks / 2)], low nibble first; null if all zero points are 8
  int64_t rows, cols, block, blocks;
  const float* x;
  float* y;
  int64_t count;
};

// The implementations for one instruction set.
struct Kernels {
  const char* name;

  // Attention in two steps, each a number of tasks that can run in any order; all of the first must end before the
  // second. `room` is the scratch memory in bytes that both share.
  int64_t (*attention_room)(const Attention&);
  int64_t (*attention_packs)(const Attention&);
  void (*attention_pack)(const Attention&, void* room, int64_t task);
  int64_t (*attention_tasks)(const Attention&);
  void (*attention_run)(const Attention&, const void* room, int64_t task);

  // Lays out codes [rows, blocks, block / 2], as MatMulNBits has them, in `linear4_bytes` bytes.
  int64_t (*linear4_bytes)(const Linear4&);
  void (*linear4_lay)(const Linear4&, const uint8_t* codes, uint8_t* to);

  // The two steps for 4-bit matrices: the first step quantizes rows of x to 8 bits, with a scale for each block.
  int64_t (*linear4_room)(const Linear4&);
  int64_t (*linear4_packs)(const Linear4&);
  void (*linear4_pack)(const Linear4&, void* room, int64_t task);
  int64_t (*linear4_tasks)(const Linear4&);
  void (*linear4_run)(const Linear4&, const void* room, int64_t task);
};

const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();

// The best kernels of this processor, or those that the environment variable VLPACK_KERNELS_ISA names if the processor
// has them; null if it has none.
const Kernels* best_kernels();

}  // namespace vlpack
