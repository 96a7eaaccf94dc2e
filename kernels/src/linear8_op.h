#pragma once
#include "ort_api.h"
namespace vlpack {
// The operator Linear8(x, codes, scales, …), for signed codes [K, N] and scales [N]; product_op.h has the other inputs.
const ort::CustomOp* linear8_op();
// The operator Linear8Blocks(x, codes, scales, …): MatMulNBits with 8 bits, without zero points. Its attributes are K, N
// and block_size, and those of product_op.h.
const ort::CustomOp* linear8_blocks_op();
}  // namespace vlpack
