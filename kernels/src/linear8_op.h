#pragma once
#include "ort_api.h"
namespace vlpack {
// The operator Linear8(x, codes, scales, rotation?, bias?), for signed codes [K, N] and scales [N]. Groups of x are
// multiplied by the matrix `rotation` first.
const ort::CustomOp* linear8_op();
// The operator Linear8Blocks(x, codes, scales, rotation?): MatMulNBits with 8 bits, without zero points. Its attributes
// are K, N and block_size.
const ort::CustomOp* linear8_blocks_op();
}  // namespace vlpack
