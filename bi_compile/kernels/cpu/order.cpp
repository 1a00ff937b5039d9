// topk: the largest (smallest) of each row, equal ones lowest index first. Threads get rows.

#include <ATen/ops/gather.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros_like.h>

#include <bit>
#include <functional>

#include "dtype.h"
#include "parallel.h"

namespace bi {
namespace {

// An integer that orders as float x does: the zeros are equal, and so are all NaN, which are the largest.
int32_t order_of(float x) {
  constexpr int32_t last = std::numeric_limits<int32_t>::max();
  if (std::isnan(x)) return last;
  auto bits = std::bit_cast<int32_t>(x + 0.0f);
  return bits < 0 ? bits ^ last : bits;
}

struct Ranks;

// The indices of the first k of a row of n. Order and index make one number, so that no two are equal.
template <class T>
void best_of_row(const T* x, int64_t n, int64_t k, bool largest, int64_t* out) {
  int64_t* rank = scratch<Ranks, int64_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    int64_t order = order_of(static_cast<float>(x[i]));
    rank[i] = ((largest ? order : ~order) << 32) + (n - 1 - i);
  }
  if (k > n / 8)
    std::sort(rank, rank + n, std::greater<>());
  else
    std::partial_sort(rank, rank + k, rank + n, std::greater<>());
  for (int64_t i = 0; i < k; ++i) out[i] = n - 1 - (rank[i] & 0xFFFFFFFF);
}

std::tuple<Tensor, Tensor> topk(const Tensor& x, int64_t k, int64_t dim, bool largest, bool) {
  if (x.dim() == 0) return {x.clone(), at::zeros_like(x, x.options().dtype(at::kLong))};
  bool packed = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  int64_t n = x.size(dim);
  TORCH_CHECK(k >= 0 && k <= n, "bi_compile::topk: k=", k, " elements of ", n, " cannot be selected");
  if (!packed || n > std::numeric_limits<int32_t>::max()) {
    auto [values, indices] = at::sort(x, /*stable=*/true, dim, largest);
    return {values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()};
  }
  Tensor rows = x.movedim(dim, -1).contiguous();
  auto shape = rows.sizes().vec();
  shape.back() = k;
  Tensor indices = at::empty(shape, x.options().dtype(at::kLong));
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = rows.const_data_ptr<T>();
    int64_t* to = indices.mutable_data_ptr<int64_t>();
    parallel_rows(n ? rows.numel() / n : 0, 4 * n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) best_of_row(from + r * n, n, k, largest, to + r * k);
    });
  });
  indices = indices.movedim(-1, dim).clone(at::MemoryFormat::Contiguous);
  return {at::gather(x, dim, indices), indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(bi_compile, CPU, m) { m.impl("topk", topk); }

}  // namespace bi
