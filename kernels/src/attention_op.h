#pragma once
#include "ort_api.h"
namespace vlpack {
// Attention(q, k, v) without a mask: [B, S, heads · D] each, fp32; attributes num_heads and scale (0: 1 / sqrt(D)).
const ort::CustomOp* attention_op();
}  // namespace vlpack
