#pragma once
#include "ort_api.h"
namespace vlpack {
// Linear4(x, codes, scales, zeros?): MatMulNBits with 4 bits; attributes K, N and block_size.
const ort::CustomOp* linear4_op();
}  // namespace vlpack
