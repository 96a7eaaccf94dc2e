// Products by 4-bit matrices, for the instruction set that the including file is compiled for.
#pragma once

#include "linear4_few.h"
#include "linear4_many.h"

namespace vlpack {
namespace {

// The product in the form that suits the number of rows of x.
struct Multiply4 {
  static bool few(const Linear4& l) { return l.count <= Few::kMost; }
  static int64_t room(const Linear4& l) { return few(l) ? Few::room(l) : Many::room(l); }
  static int64_t packs(const Linear4& l) { return few(l) ? Few::packs(l) : Many::packs(l); }
  static void pack(const Linear4& l, void* room, int64_t task) {
    return few(l) ? Few::pack(l, room, task) : Many::pack(l, room, task);
  }
  static int64_t tasks(const Linear4& l) { return few(l) ? Few::tasks(l) : Many::tasks(l); }
  static void run(const Linear4& l, const void* room, int64_t task) {
    return few(l) ? Few::run(l, room, task) : Many::run(l, room, task);
  }
};

}  // namespace
}  // namespace vlpack
