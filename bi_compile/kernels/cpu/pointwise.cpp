// tanh as the code computes it that Inductor generates for a CPU: SLEEF's, on whole vectors. Threads get elements.

// ATen's vectors for this processor, as Inductor chooses them
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#endif

#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "parallel.h"

namespace bi {
namespace {

template <class T>
void tanh_of(const T* x, T* y, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t COST = 16;  // elementary steps of an element
  parallel_rows(ceil_div(n, Vec::size()), COST * Vec::size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * Vec::size(); i < std::min(n, end * Vec::size()); i += Vec::size()) {
      const auto count = std::min<int64_t>(Vec::size(), n - i);
      Vec::loadu(x + i, count).tanh().store(y + i, count);
    }
  });
}

at::Tensor tanh(const at::Tensor& self) {
  TORCH_CHECK(self.scalar_type() == at::kFloat || self.scalar_type() == at::kDouble, "bi_compile::tanh has no kernel for ",
              self.scalar_type(), ": use float32 or float64, or torch.tanh, which computes the others so");
  const auto x = self.contiguous();
  auto y = at::empty_like(x);
  if (x.scalar_type() == at::kDouble)
    tanh_of(x.const_data_ptr<double>(), y.mutable_data_ptr<double>(), x.numel());
  else
    tanh_of(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel());
  return y;
}

TORCH_LIBRARY_IMPL(bi_compile, CPU, m) { m.impl("tanh", tanh); }

}  // namespace
}  // namespace bi
