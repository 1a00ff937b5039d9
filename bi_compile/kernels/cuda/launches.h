// Launches of kernels that Triton compiled, without Python.
//
// The first call of each layout goes to a function in Python, which compiles and runs the kernel and tells `learn` what it launched.
// Later calls launch the same binary with the same arguments but for pointers and the few numbers that follow the batch.
#pragma once

#include "common.h"

#include <cuda.h>

#include <array>
#include <bit>
#include <utility>

namespace bi_compile {

// Of an array or a vector of numbers.
struct KeyHash {
  template <class Numbers>
  size_t operator()(const Numbers& key) const {
    uint64_t h = 14695981039346656037u;
    for (const auto part : key) h = (h ^ static_cast<uint64_t>(part)) * 1099511628211u;
    return h ^ (h >> 29);
  }
};

// The operator, and everything that decides what is compiled and what it is given as constants; zeros behind.
using Key = std::array<int64_t, 24>;
enum Operator : int64_t { kRmsNorm, kAddRmsNorm, kSoftmax, kLogSoftmax, kSum, kMean, kPagedAttention, kJoinParts, kQkNorm };

struct Launch {
  CUfunction function = nullptr;
  unsigned threads = 0, shared = 0;
  int64_t programs = 0;  // in the call that it was learned from
  int64_t rows_per_program = 0;
  std::vector<std::pair<int64_t, int64_t>> arguments;  // kind, value
  std::vector<std::pair<CUtensorMap, int64_t>> maps;  // a descriptor but for its address, which is this slot's
};

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

// What `learn` was told for the key, or null. It stays where it is.
const Launch* find(const Key& key);

// What `described` in launches.py says of a launch. Raises where the binary does not take such arguments.
Launch launch_of(at::IntArrayRef description);

// slots, numbers: what arguments of the kinds kSlot and kNumber are taken from.
void launch(const Launch& it, int64_t programs, at::ArrayRef<const void*> slots, at::IntArrayRef numbers);

}  // namespace bi_compile
