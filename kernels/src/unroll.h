// Loops that are unrolled by the compiler's front end.
#pragma once

#include <utility>

#include "vectors.h"

namespace vlpack {
namespace {

template <class Body, int... Indices>
VLPACK_INLINE void each_of(const Body& body, std::integer_sequence<int, Indices...>) {
  (body(std::integral_constant<int, Indices>()), ...);
}

// Calls body(i) for i = 0 … kCount - 1, each a constant. Arrays that are indexed by constants are kept in registers,
// for which GCC does not unroll loops early enough.
template <int kCount, class Body>
VLPACK_INLINE void each(const Body& body) {
  each_of(body, std::make_integer_sequence<int, kCount>());
}

}  // namespace
}  // namespace vlpack
