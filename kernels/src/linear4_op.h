#pragma once
#include "ort_api.h"
namespace vlpack {
// The operator Linear4(x, codes, scales, zeros?, …): MatMulNBits with 4 bits; product_op.h has the other inputs. Its
// attributes are K, N and block_size, and those of product_op.h.
const ort::CustomOp* linear4_op();
}  // namespace vlpack
