// Scratch memory of threads.
#pragma once

#include <cstdint>
#include <vector>

namespace vlpack {
namespace {

// Scratch memory of a thread for `count` values, kept for its next tasks; kUse distinguishes the purposes.
template <class Value, int kUse>
Value* scratch(int64_t count) {
  thread_local std::vector<Value> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

}  // namespace
}  // namespace vlpack
