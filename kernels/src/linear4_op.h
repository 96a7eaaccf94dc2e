#pragma once
#include "ort_api.h"
namespace vlpack {
// The operator Linear4(x, codes, scales, zeros?): MatMulNBits with 4 bits; its attributes are K, N and block_size.
const ort::CustomOp* linear4_op();
}  // namespace vlpack
