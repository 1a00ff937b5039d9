// rms_norm, add_rms_norm, layer_norm, group_norm. Statistics in double, in the order of row_sum.h, then rounded to the
// statistic's dtype (float32; float64 for float64); that value scales the row.
//
// layer_norm and group_norm compute y in that dtype and round it once. rms_norm rounds where transformers' models and vLLM's
// definition (vllm/ir/ops/layernorm.py) round, so that it has the bits of theirs, taken apart or not: the squares, their
// mean, and mean + eps to the statistic's dtype; x * rstd to the weight's dtype; y to x's.

#include "row_sum.h"

namespace bi {
namespace {

// A weight or bias of n elements, contiguous in the type S of the computation; nullptr for none.
template <class S>
struct Param {
  Tensor held;
  const S* at = nullptr;
  ScalarType given = ScalarType::Undefined;
  Param(const OptTensor& p) {
    if (!p || !p->defined()) return;
    given = p->scalar_type();
    held = p->to(c10::CppTypeToScalarType<S>::value).contiguous();
    at = held.const_data_ptr<S>();
  }
};

int64_t last_size(const char* op, const Tensor& x) {
  TORCH_CHECK(x.dim() > 0, "bi_compile::", op, " takes a tensor of at least one dimension");
  return x.size(-1);
}

void check_param(const char* op, const OptTensor& p, int64_t n) {
  if (!p || !p->defined()) return;
  TORCH_CHECK(p->dim() == 1 && p->size(0) == n, "bi_compile::", op, " takes a weight or bias of ", n, " elements, got ", p->sizes());
  check_float(op, p->scalar_type());
}

Tensor like(const Tensor& x, at::IntArrayRef sizes, ScalarType type) {
  return at::empty(sizes, x.options().dtype(type).memory_format(at::MemoryFormat::Contiguous));
}

Tensor stat_like(const Tensor& x) {
  at::DimVector sizes(x.sizes());
  sizes.back() = 1;
  return like(x, sizes, statistic(x));
}

int64_t rows_in(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// y = x * rstd * weight for one row; gives rstd.
template <class T>
Acc<T> rms_row(const T* x, const Param<Acc<T>>& weight, int64_t C, double eps, T* y) {
  using S = Acc<T>;
  auto square = [](f64x8 v) {
    if constexpr (std::is_same_v<S, double>) return v * v;
    else return __builtin_convertvector(__builtin_convertvector(v * v, f32x8), f64x8);
  };
  S mean = static_cast<S>(row_sum(x, C, square) / static_cast<double>(C));
  S rstd = 1 / std::sqrt(mean + static_cast<S>(eps));
  bool wide = weight.given == c10::CppTypeToScalarType<S>::value;
  each_vector<LANES<T>>(C, [&](int64_t i, auto count) {
    auto v = load(x + i, count) * rstd;
    if (weight.at) {
      if (!wide) {
        store(y + i, v, count);  // rounded to T
        v = load(y + i, count);
      }
      v = v * load(weight.at + i, count);
    }
    store(y + i, v, count);
  });
  return rstd;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptTensor& weight, double eps) {
  check_float("rms_norm", x.scalar_type());
  int64_t C = last_size("rms_norm", x);
  check_param("rms_norm", weight, C);
  Tensor in = x.contiguous(), y = like(x, x.sizes(), x.scalar_type()), rstd = stat_like(x);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Param<Acc<T>> w(weight);
    const T* px = in.const_data_ptr<T>();
    T* py = y.mutable_data_ptr<T>();
    auto stat = rstd.mutable_data_ptr<Acc<T>>();
    parallel_rows(rows_in(x), C, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) stat[r] = rms_row(px + r * C, w, C, eps, py + r * C);
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const OptTensor& weight, double eps) {
  TORCH_CHECK(x.scalar_type() == residual.scalar_type() && x.sizes() == residual.sizes(),
              "bi_compile::add_rms_norm takes x and residual of one shape and dtype, got ", x.sizes(), " ", x.scalar_type(),
              " and ", residual.sizes(), " ", residual.scalar_type());
  check_float("add_rms_norm", x.scalar_type());
  int64_t C = last_size("add_rms_norm", x);
  check_param("add_rms_norm", weight, C);
  Tensor in = x.contiguous(), other = residual.contiguous(), y = like(x, x.sizes(), x.scalar_type());
  Tensor rstd = stat_like(x), sum = like(x, x.sizes(), x.scalar_type());
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Param<Acc<T>> w(weight);
    const T *px = in.const_data_ptr<T>(), *pr = other.const_data_ptr<T>();
    T *py = y.mutable_data_ptr<T>(), *ps = sum.mutable_data_ptr<T>();
    auto stat = rstd.mutable_data_ptr<Acc<T>>();
    parallel_rows(rows_in(x), C, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T *a = px + r * C, *b = pr + r * C;
        T* s = ps + r * C;
        each_vector<LANES<T>>(C, [&](int64_t i, auto count) { store(s + i, load(a + i, count) + load(b + i, count), count); });
        stat[r] = rms_row(s, w, C, eps, py + r * C);
      }
    });
  });
  return {y, rstd, sum};
}

// Mean and 1 / sqrt(var + eps) of a row, in double.
template <class T>
std::pair<double, double> moments(const T* x, int64_t C, double eps) {
  double mean = row_sum(x, C) / static_cast<double>(C);
  return {mean, 1 / std::sqrt(row_square_sum(x, C, mean) / static_cast<double>(C) + eps)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps) {
  check_float("layer_norm", x.scalar_type());
  int64_t C = last_size("layer_norm", x);
  check_param("layer_norm", weight, C);
  check_param("layer_norm", bias, C);
  Tensor in = x.contiguous(), y = like(x, x.sizes(), x.scalar_type()), mean = stat_like(x), rstd = stat_like(x);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using S = Acc<T>;
    Param<S> w(weight), b(bias);
    const T* px = in.const_data_ptr<T>();
    T* py = y.mutable_data_ptr<T>();
    S *pm = mean.mutable_data_ptr<S>(), *pr = rstd.mutable_data_ptr<S>();
    parallel_rows(rows_in(x), C, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        auto [m, s] = moments(px + r * C, C, eps);
        S shift = pm[r] = static_cast<S>(m), factor = pr[r] = static_cast<S>(s);
        each_vector<LANES<T>>(C, [&](int64_t i, auto count) {
          auto v = (load(px + r * C + i, count) - shift) * factor;
          auto scale = w.at ? load(w.at + i, count) : Vec<T>{} + 1;
          store(py + r * C + i, fma(v, scale, b.at ? load(b.at + i, count) : Vec<T>{}), count);
        });
      }
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias, int64_t groups, double eps) {
  check_float("group_norm", x.scalar_type());
  TORCH_CHECK(x.dim() >= 2 && groups > 0 && x.size(1) % groups == 0,
              "bi_compile::group_norm needs channels divisible by groups, got ", x.sizes(), " and ", groups);
  int64_t N = x.size(0), channels = x.size(1), each = channels / groups, rest = 1;
  for (int64_t i = 2; i < x.dim(); ++i) rest *= x.size(i);
  check_param("group_norm", weight, channels);
  check_param("group_norm", bias, channels);
  int64_t C = each * rest;
  Tensor in = x.contiguous(), y = like(x, x.sizes(), x.scalar_type());
  Tensor mean = like(x, {N, groups}, statistic(x)), rstd = like(x, {N, groups}, statistic(x));
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using S = Acc<T>;
    Param<S> w(weight), b(bias);
    const T* px = in.const_data_ptr<T>();
    T* py = y.mutable_data_ptr<T>();
    S *pm = mean.mutable_data_ptr<S>(), *pr = rstd.mutable_data_ptr<S>();
    parallel_rows(N * groups, C, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        auto [m, s] = moments(px + r * C, C, eps);
        S shift = pm[r] = static_cast<S>(m), factor = pr[r] = static_cast<S>(s);
        for (int64_t c = 0; c < each; ++c) {
          int64_t channel = r % groups * each + c, at = r * C + c * rest;
          Vec<T> scale = Vec<T>{} + (w.at ? w.at[channel] : 1), add = Vec<T>{} + (b.at ? b.at[channel] : 0);
          each_vector<LANES<T>>(rest, [&](int64_t i, auto count) {
            store(py + at + i, fma((load(px + at + i, count) - shift) * factor, scale, add), count);
          });
        }
      }
    });
  });
  return {y, mean, rstd};
}

}  // namespace

TORCH_LIBRARY_IMPL(bi_compile, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("layer_norm", layer_norm);
  m.impl("group_norm", group_norm);
}

}  // namespace bi
