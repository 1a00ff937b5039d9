// sum, mean, var_mean, logsumexp, softmax, log_softmax, cumsum. The order of the sums stands in row_sum.h; threads get rows.

#include <c10/core/WrapDimMinimal.h>

#include "row_sum.h"

namespace bi {
namespace {

int64_t wrap(const char* op, int64_t dim, int64_t dims) {
  int64_t n = std::max<int64_t>(dims, 1);
  TORCH_CHECK_INDEX(-n <= dim && dim < n, "bi_compile::", op, ": dimension ", dim, " is out of range for a ", dims, "-D tensor");
  return dim < 0 ? dim + n : dim;
}

// A tensor as R rows of C contiguous elements, and the shape of what is left of it.
struct Rows {
  Tensor x;
  int64_t R = 1, C = 1;
  at::DimVector shape;
};

Rows rows_of(const char* op, const Tensor& x, at::IntArrayRef dim, bool keepdim, std::optional<ScalarType> dtype = {}) {
  check_float(op, x.scalar_type());
  check_float(op, dtype.value_or(x.scalar_type()));
  std::vector<bool> reduced(std::max<int64_t>(x.dim(), 1), dim.empty());
  for (int64_t d : dim) {
    int64_t i = wrap(op, d, x.dim());
    TORCH_CHECK(!reduced[i], "bi_compile::", op, ": a dimension appears twice in ", dim);
    reduced[i] = true;
  }
  Rows r;
  at::DimVector order, last;
  for (int64_t i = 0; i < x.dim(); ++i) {
    (reduced[i] ? last : order).push_back(i);
    (reduced[i] ? r.C : r.R) *= x.size(i);
    if (keepdim || !reduced[i]) r.shape.push_back(reduced[i] ? 1 : x.size(i));
  }
  order.append(last.begin(), last.end());
  bool in_place = std::is_sorted(order.begin(), order.end());
  r.x = x.to(dtype.value_or(x.scalar_type()));
  r.x = (in_place ? r.x : r.x.permute(order)).contiguous();
  return r;
}

// out[r] = f(row, C) for each row; f gives T.
template <class F>
Tensor each_row(const Rows& r, F f) {
  Tensor out = at::empty(r.shape, r.x.options());
  with_type(r.x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* x = r.x.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    parallel_rows(r.R, r.C, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) y[i] = f(x + i * r.C, r.C, i);
    });
  });
  return out;
}

Tensor sum(const Tensor& x, at::IntArrayRef dim, bool keepdim, std::optional<ScalarType> dtype) {
  return each_row(rows_of("sum", x, dim, keepdim, dtype), []<class T>(const T* row, int64_t C, int64_t) { return narrow<T>(row_sum(row, C)); });
}

Tensor mean(const Tensor& x, at::IntArrayRef dim, bool keepdim, std::optional<ScalarType> dtype) {
  return each_row(rows_of("mean", x, dim, keepdim, dtype),
                  []<class T>(const T* row, int64_t C, int64_t) { return narrow<T>(row_sum(row, C) / static_cast<double>(C)); });
}

std::tuple<Tensor, Tensor> var_mean(const Tensor& x, at::IntArrayRef dim, const at::Scalar& correction, bool keepdim) {
  Rows r = rows_of("var_mean", x, dim, keepdim);
  double divisor = std::max(static_cast<double>(r.C) - correction.toDouble(), 0.0);
  Tensor means = at::empty(r.shape, r.x.options());
  Tensor var = each_row(r, [&]<class T>(const T* row, int64_t C, int64_t i) {
    double m = row_sum(row, C) / static_cast<double>(C);
    means.mutable_data_ptr<T>()[i] = narrow<T>(m);
    return narrow<T>(row_square_sum(row, C, m) / divisor);
  });
  return {var, means};
}

int64_t padded(int64_t C) { return (C + 15) & ~int64_t{15}; }

struct Exps;

Tensor logsumexp(const Tensor& x, at::IntArrayRef dim, bool keepdim) {
  return each_row(rows_of("logsumexp", x, dim, keepdim), []<class T>(const T* row, int64_t C, int64_t) {
    Acc<T> max = row_max(row, C);
    Acc<T> shift = std::isinf(max) ? 0 : max;
    double total = row_exp(row, C, shift, scratch<Exps, Acc<T>>(padded(C)));
    return narrow<T>(static_cast<double>(shift) + std::log(total));
  });
}

// f(row, C, out) for each row along `dim`; out is in x's dtype, after the cast to `dtype`.
template <class F>
Tensor along_dim(const char* op, const Tensor& x, int64_t dim, std::optional<ScalarType> dtype, F f) {
  check_float(op, x.scalar_type());
  check_float(op, dtype.value_or(x.scalar_type()));
  dim = wrap(op, dim, x.dim());
  bool last = dim + 1 >= x.dim();
  Tensor in = x.to(dtype.value_or(x.scalar_type()));
  in = (last ? in : in.transpose(dim, -1)).contiguous();
  Tensor out = at::empty(in.sizes(), in.options());
  int64_t C = x.dim() ? in.size(-1) : 1;
  with_type(in.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* px = in.const_data_ptr<T>();
    T* py = out.mutable_data_ptr<T>();
    parallel_rows(C ? in.numel() / C : 0, 4 * C, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(px + i * C, C, py + i * C);
    });
  });
  return last ? out : out.transpose(dim, -1).contiguous();
}

Tensor softmax(const Tensor& x, int64_t dim, std::optional<ScalarType> dtype) {
  return along_dim("softmax", x, dim, dtype, []<class T>(const T* row, int64_t C, T* out) {
    Acc<T>* e = scratch<Exps, Acc<T>>(padded(C));
    double inverse = 1 / row_exp(row, C, row_max(row, C), e);
    each_vector<LANES<T>>(C, [&](int64_t i, auto count) { store(out + i, scale(load(e + i), inverse), count); });
  });
}

Tensor log_softmax(const Tensor& x, int64_t dim, std::optional<ScalarType> dtype) {
  return along_dim("log_softmax", x, dim, dtype, []<class T>(const T* row, int64_t C, T* out) {
    Acc<T> max = row_max(row, C);
    auto log = static_cast<Acc<T>>(std::log(row_exp(row, C, max, scratch<Exps, Acc<T>>(padded(C)))));
    each_vector<LANES<T>>(C, [&](int64_t i, auto count) { store(out + i, (load(row + i, count) - max) - log, count); });
  });
}

Tensor cumsum(const Tensor& x, int64_t dim, std::optional<ScalarType> dtype) {
  check_float("cumsum", x.scalar_type());
  check_float("cumsum", dtype.value_or(x.scalar_type()));
  dim = wrap("cumsum", dim, x.dim());
  Tensor in = x.to(dtype.value_or(x.scalar_type())).contiguous();
  Tensor out = at::empty(in.sizes(), in.options());
  int64_t C = x.dim() ? in.size(dim) : 1, inner = x.dim() ? in.stride(dim) : 1;
  if (in.numel() == 0) return out;
  constexpr int64_t BLOCK = 64;  // columns that a task adds up side by side
  int64_t blocks = ceil_div(inner, BLOCK);
  with_type(in.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* px = in.const_data_ptr<T>();
    T* py = out.mutable_data_ptr<T>();
    parallel_rows(in.numel() / (C * inner) * blocks, C * std::min(inner, BLOCK), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t first = task % blocks * BLOCK, n = std::min(BLOCK, inner - first);
        int64_t at = task / blocks * C * inner + first;
        double total[BLOCK] = {};
        for (int64_t c = 0; c < C; ++c, at += inner)
          for (int64_t i = 0; i < n; ++i) py[at + i] = narrow<T>(total[i] += static_cast<double>(px[at + i]));
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(bi_compile, CPU, m) {
  m.impl("sum", sum);
  m.impl("mean", mean);
  m.impl("var_mean", var_mean);
  m.impl("logsumexp", logsumexp);
  m.impl("softmax", softmax);
  m.impl("log_softmax", log_softmax);
  m.impl("cumsum", cumsum);
}

}  // namespace bi
