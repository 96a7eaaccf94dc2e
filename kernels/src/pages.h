// Memory for weights, in huge pages where possible.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vlpack {

constexpr int64_t kPage = 4096, kHugePage = 1 << 21;

// A block of memory in pages of 2 MiB where the system provides them, so reading it needs few address translations.
class Pages {
 public:
  Pages() = default;
  explicit Pages(int64_t bytes) {
    const int64_t align = bytes < kHugePage ? 64 : kHugePage;
    void* memory = nullptr;
    if (posix_memalign(&memory, align, bytes)) throw std::bad_alloc();
    data_.reset(static_cast<uint8_t*>(memory));
#ifdef MADV_HUGEPAGE
    if (bytes >= kHugePage) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  uint8_t* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> data_;
};

// Tells the system that some memory will not be read soon. Its contents stay valid; pages that are mapped from a file
// are removed from memory until they are read again.
inline void not_needed(const void* memory, int64_t bytes) {
#ifdef MADV_PAGEOUT
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace vlpack
