// Products by 4-bit matrices, for the instruction set that the including file is compiled for.
#pragma once

#include "linear4_few.h"
#include "linear4_many.h"

namespace vlpack {
namespace {

// Largest number of rows of x for the form for few rows. It computes with floats once in each block, so it is slower for
// small blocks.
constexpr int64_t kFewRows = 12, kFewRowsOfSmallBlocks = 8;

// The product in the form that suits the number of rows of x.
struct Multiply4 {
  static bool few(const Linear4& l) { return l.count <= (l.block < kChunk4 ? kFewRowsOfSmallBlocks : kFewRows); }
  static int64_t room(const Linear4& l) { return few(l) ? l.count * Few::row_room(l) : Many::room(l); }
  static int64_t packs(const Linear4& l) { return few(l) ? l.count : Many::packs(l); }
  static void pack(const Linear4& l, void* room, int64_t task) {
    return few(l) ? Few::pack(l, static_cast<char*>(room), task) : Many::pack(l, room, task);
  }
  static int64_t tasks(const Linear4& l) { return few(l) ? Few::tasks(l) : Many::tasks(l); }
  static void run(const Linear4& l, const void* room, int64_t task) {
    return few(l) ? Few::run(l, static_cast<const char*>(room), task) : Many::run(l, room, task);
  }
};

}  // namespace
}  // namespace vlpack
