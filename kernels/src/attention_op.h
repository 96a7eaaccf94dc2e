#pragma once
#include "ort_api.h"
namespace vlpack {
// The operator Attention(q, k, v) without a mask. Inputs are fp32 [B, S, heads · D]; its attributes are num_heads and
// scale, of which 0 stands for 1 / sqrt(D).
const ort::CustomOp* attention_op();
}  // namespace vlpack
