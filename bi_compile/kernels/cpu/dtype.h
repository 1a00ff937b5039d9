// Tensors and their dtypes: which ones have kernels, and the choice of the C++ type.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vec.h"

namespace bi {

using at::ScalarType;
using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline void check_float(const char* op, ScalarType t) {
  TORCH_CHECK(t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kDouble, "bi_compile::", op,
              " has no kernel for ", t, ": use float32, bfloat16, float16 or float64");
}

// f(a zero of dtype t's C++ type); t has passed check_float.
template <class F>
inline void with_type(ScalarType t, F f) {
  switch (t) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(BFloat16{});
    case at::kHalf: return f(Half{});
    default: return f(double{});
  }
}

inline ScalarType statistic(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace bi
