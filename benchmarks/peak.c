// What several threads of a processor with AVX-512 and VNNI can do at most: multiplications of each kind in independent
// sums, and reading from memory. `peak.py` makes a shared library of it, and calls `rate`.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { kMost = 1024, kSums = 24, kStreams = 2, kLine = 64, kAtOnce = 4 * kLine };
static const long kLoops = 3000000;      // of 24 instructions
static const size_t kBytes = 1ul << 28;  // that are read, more than caches hold

// A loop of 24 instructions, each of which adds products to a register of its own. In assembly, because compilers copy
// the sums from register to register. A function has nothing else in its vector registers, so these are not declared.
#define SUMS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) \
    X(18) X(19) X(20) X(21) X(22) X(23)
#define CLEAR(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define INT8(i) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #i "\n"
#define BFLOAT16(i) "vdpbf16ps %%zmm31, %%zmm30, %%zmm" #i "\n"
#define FP32(i) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #i "\n"
#define LOOP(NAME, ADD)                                                                                        \
  __attribute__((noinline)) static uint64_t NAME(const char* from, size_t bytes) {                            \
    long left = kLoops;                                                                                        \
    __asm__ volatile(SUMS(CLEAR) CLEAR(30) CLEAR(31) "1:\n" SUMS(ADD) "dec %0\njnz 1b" : "+r"(left) : : "cc"); \
    return bytes + (from != NULL);                                                                             \
  }
LOOP(int8, INT8)
LOOP(bfloat16, BFLOAT16)
LOOP(fp32, FP32)

// Reads all lines of a part of the memory in two streams, of which the processor fetches lines in advance.
static uint64_t reading(const char* from, size_t bytes) {
  typedef uint64_t Line __attribute__((vector_size(kLine)));
  Line sums[4] = {{0}};
  for (size_t i = 0; i < bytes / kStreams; i += kAtOnce)
    for (size_t stream = 0; stream < kStreams; ++stream)
      for (size_t k = 0; k < 4; ++k) sums[k] |= *(const Line*)(from + stream * (bytes / kStreams) + i + k * kLine);
  uint64_t total = 0;  // of all numbers, so that the compiler leaves nothing out
  for (size_t k = 0; k < 4; ++k)
    for (size_t i = 0; i < kLine / 8; ++i) total += sums[k][i];
  return total;
}

typedef uint64_t (*Work)(const char* from, size_t bytes);
struct Task {
  Work work;
  const char* from;
  size_t bytes;
  volatile uint64_t result;
};

static void* run(void* given) {
  struct Task* const task = given;
  task->result = task->work(task->from, task->bytes);
  return NULL;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

// Does some work once, in a number of threads: `int8`, `bfloat16` or `fp32` for multiplications, or `reading`. Returns
// 10^9 multiplications or bytes a second, of all threads together; 0 if the processor cannot do it.
double rate(const char* name, int threads) {
  static struct Task tasks[kMost];
  static pthread_t made[kMost];
  static char* memory;
  if (!memory) {
    memory = aligned_alloc(1 << 21, kBytes);
    if (!memory) return 0;
    madvise(memory, kBytes, MADV_HUGEPAGE);
    memset(memory, 1, kBytes);
  }
  if (threads < 1 || threads > kMost || (!strcmp(name, "bfloat16") && !__builtin_cpu_supports("avx512bf16"))) return 0;
  const Work work = !strcmp(name, "int8") ? int8
                    : !strcmp(name, "bfloat16") ? bfloat16
                    : !strcmp(name, "fp32") ? fp32 : reading;
  const size_t bytes = kBytes / threads / (kStreams * kAtOnce) * (kStreams * kAtOnce);
  const double start = now();
  for (int i = 0; i < threads; ++i) {
    tasks[i] = (struct Task){work, memory + i * bytes, bytes, 0};
    if (i > 0 && pthread_create(&made[i], NULL, run, &tasks[i])) abort();
  }
  run(&tasks[0]);
  for (int i = 1; i < threads; ++i) pthread_join(made[i], NULL);
  const double each = work == int8 ? 64 : work == bfloat16 ? 32 : 16;
  return 1e-9 * threads * (work == reading ? bytes : kLoops * kSums * each) / (now() - start);
}
