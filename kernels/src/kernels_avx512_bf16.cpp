// The kernels for AVX-512 with VNNI and bfloat16; CMakeLists.txt compiles this file with the options for these.
#include "attention_brain.h"
#include "attention_few.h"
#include "linear4_kernel.h"
#include "linear8_kernel.h"

namespace vlpack {
namespace {

void narrow_all(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(load_some(from + i, count - i).v);
    _mm256_mask_storeu_epi16(to + i, count - i < 16 ? (1u << (count - i)) - 1 : 0xffff, halves);
  }
}

}  // namespace

const Kernels& avx512_bf16_kernels() {
  using Best = AttendBest<AttendBrain>;
  using Four = Multiply4;
  static const Kernels kernels = {
      "avx512_bf16",
      Best::room, Best::packs, Best::pack, Best::tasks, Best::run, narrow_all,
      laid_bytes, lay,
      Four::room, Four::packs, Four::pack, Four::tasks, Four::run,
      kLinear8,
  };
  return kernels;
}

}  // namespace vlpack
