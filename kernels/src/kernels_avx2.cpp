// The kernels for AVX2; CMakeLists.txt compiles this file with the options for this instruction set.
#include "attention_few.h"
#include "linear4_kernel.h"
#include "linear8_kernel.h"

namespace vlpack {

const Kernels& avx2_kernels() {
  using Best = AttendBest<Attend>;
  using Four = Multiply4;
  static const Kernels kernels = {
      "avx2",
      Best::room, Best::packs, Best::pack, Best::tasks, Best::run, nullptr,
      laid_bytes, lay,
      Four::room, Four::packs, Four::pack, Four::tasks, Four::run,
      kLinear8,
  };
  return kernels;
}

}  // namespace vlpack
