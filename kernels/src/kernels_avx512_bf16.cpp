// The kernels for AVX-512 with VNNI and bfloat16; CMakeLists.txt compiles this file with the options for these.
#include "attention_few.h"
#include "linear4_kernel.h"
#include "linear8_kernel.h"

namespace vlpack {

const Kernels& avx512_bf16_kernels() {
  using Attend = AttendBest<Brain>;
  using Four = Multiply4;
  static const Kernels kernels = {
      "avx512_bf16",
      Attend::room, Attend::packs, Attend::pack, Attend::tasks, Attend::run,
      laid_bytes, lay,
      Four::room, Four::packs, Four::pack, Four::tasks, Four::run,
      kLinear8,
  };
  return kernels;
}

}  // namespace vlpack
