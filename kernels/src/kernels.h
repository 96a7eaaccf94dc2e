// The interface of the kernels, which are compiled once for each instruction set, and the choice among these.
#pragma once

#include <cstdint>

#include "linear8.h"

namespace vlpack {

// Attention of `queries` tokens to `keys` tokens, for `batch` sequences and `heads` heads of keys with `size` channels.
// Each head of keys serves `group` adjacent heads of queries. The first query attends to the first `visible` keys, and
// every later one to one more, up to all of them. Adjacent tokens of a sequence are `*_row` elements apart, adjacent
// sequences `*_batch`, and adjacent heads `*_head`.
struct Attention {
  const float* q;
  const void *k, *v;  // floats, or bfloat16 numbers if `narrow`
  float* out;
  int64_t batch, heads, group, queries, keys, size, visible;
  int64_t q_row, q_batch, q_head;  // of queries and outputs
  int64_t k_row, k_batch, k_head;  // of keys and values
  float scale;                     // factor of the dot products
  bool exact;                      // whether products are in fp32 in any case
  bool narrow;                     // whether keys and values are bfloat16 numbers; never if `exact`
};

// A product by a 4-bit matrix.
struct Linear4 : Product {
  const uint8_t* codes;  // in the layout of `linear4_lay`
  const float* scales;   // [rows, blocks]
  const uint8_t* zeros;  // zero points [rows, ceil(blocks / 2)], low nibble first; null if all are 8
  int64_t block, blocks;
};

// The implementations for one instruction set.
struct Kernels {
  const char* name;

  // Attention has two steps, packing keys and values and then computing outputs. Each consists of tasks that can run in
  // any order and at the same time, but all tasks of the first step must end before the second. `attention_room` is the
  // size in bytes of the scratch memory `room` that both steps share.
  int64_t (*attention_room)(const Attention&);
  int64_t (*attention_packs)(const Attention&);
  void (*attention_pack)(const Attention&, void* room, int64_t task);
  int64_t (*attention_tasks)(const Attention&);
  void (*attention_run)(const Attention&, const void* room, int64_t task);

  // Rounds numbers to bfloat16; null if this instruction set does not multiply such numbers, so `narrow` is not allowed.
  void (*narrow)(const float* from, uint16_t* to, int64_t count);

  // Rearranges codes [rows, blocks, block / 2] of MatMulNBits into the layout of the kernels, in `linear4_bytes` bytes.
  int64_t (*linear4_bytes)(const Linear4&);
  void (*linear4_lay)(const Linear4&, const uint8_t* codes, uint8_t* to);

  // Products by 4-bit matrices have two steps, too; the first quantizes rows of x to 8 bits, with a scale
  // per block or wide block.
  int64_t (*linear4_room)(const Linear4&);
  int64_t (*linear4_packs)(const Linear4&);
  void (*linear4_pack)(const Linear4&, void* room, int64_t task);
  int64_t (*linear4_tasks)(const Linear4&);
  void (*linear4_run)(const Linear4&, const void* room, int64_t task);

  Linear8Kernels linear8;
};

const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();

// The kernels for the best instruction set of this processor, or for the one that the environment variable
// VLPACK_KERNELS_ISA names if the processor has it; null if there are none.
const Kernels* best_kernels();

}  // namespace vlpack
