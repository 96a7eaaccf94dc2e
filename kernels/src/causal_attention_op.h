#pragma once
#include "ort_api.h"
namespace vlpack {
// The operator GroupQueryAttention(q, k, v, past_key, past_value, seqlens_k, total_sequence_length, query_seqlens) with
// the inputs, in the same places, and the outputs of com.microsoft's operator of that name, whose other inputs and
// attributes it does not have. Its attributes are num_heads, kv_num_heads, scale, of which 0 stands for 1 / sqrt(D), and
// exact: whether products are in fp32 in any case. Outputs of padding tokens are 0.
const ort::CustomOp* causal_attention_op();

// The same with a cache of bfloat16 numbers.
const ort::CustomOp* narrow_causal_attention_op();
}  // namespace vlpack
