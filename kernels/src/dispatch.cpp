// The choice of an instruction set, which is made once in a process.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace vlpack {
namespace {

const Kernels* choose() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const char* masked = std::getenv("VLPACK_KERNELS_ISA");
  auto allowed = [&](const Kernels& kernels) { return !masked || !*masked || !std::strcmp(masked, kernels.name); };
  if (bf16 && allowed(avx512_bf16_kernels())) return &avx512_bf16_kernels();
  if (avx512 && allowed(avx512_kernels())) return &avx512_kernels();
  if (avx2 && allowed(avx2_kernels())) return &avx2_kernels();
  return nullptr;
}

}  // namespace

const Kernels* best_kernels() {
  static const Kernels* const kernels = choose();
  return kernels;
}

}  // namespace vlpack
