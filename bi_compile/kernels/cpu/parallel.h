// Work shared out over threads, and the scratch memory that each thread keeps.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace bi {

// Memory of this thread for `Slot`, kept between calls; 64-byte aligned.
template <class Slot, class T>
inline T* scratch(int64_t n) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t held = 0;
  int64_t bytes = (n * static_cast<int64_t>(sizeof(T)) + 127) & ~int64_t{63};
  if (bytes > held) {
    memory.reset(std::aligned_alloc(64, bytes));
    held = memory ? bytes : 0;
    TORCH_CHECK(memory, "bi_compile: no memory for ", bytes, " bytes of scratch");
  }
  return static_cast<T*>(memory.get());
}

// f(begin, end) over `rows` independent rows of `cost` elementary steps each, on as many threads as that is worth.
template <class F>
inline void parallel_rows(int64_t rows, int64_t cost, const F& f) {
  if (rows == 0) return;
  constexpr int64_t WORTH = 16384;  // steps that take about as long as waking a thread
  at::parallel_for(0, rows, std::max<int64_t>(1, WORTH / std::max<int64_t>(1, cost)), f);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace bi
