// Norms, softmax and sums over rows.
#include "launches.h"

namespace bi_compile {
namespace {

// Rows of `length` elements: `group` of them `row` elements apart, the groups `between` apart; one each where they lie evenly.
struct Rows {
  int64_t count, length, group, between, row;
};

bool multiple(int64_t x) { return x % 16 == 0; }

// As `as_head_rows` in kernels/triton/launch.py. False where that would copy, or where there is nothing to do.
bool rows_of(const at::Tensor& x, bool heads, Rows& r) {
  if (x.dim() == 0 || x.numel() == 0 || !aligned(x)) return false;
  r.length = x.size(-1);
  r.count = x.numel() / r.length;
  if (r.count > INT32_MAX) return false;
  r.group = 1, r.between = r.length, r.row = 0;
  if (x.is_contiguous()) return true;
  if (x.stride(-1) != 1 || r.length == 1 || !multiple(r.length)) return false;
  if (x.dim() == 3 && x.size(0) == 1) {
    r.between = x.size(1) > 1 ? x.stride(1) : r.length;
    return multiple(r.between);
  }
  if (x.dim() == 2) {
    r.between = x.size(0) > 1 ? x.stride(0) : r.length;
    return multiple(r.between);
  }
  if (!heads || x.dim() != 3 || x.size(1) < 2) return false;
  r.group = x.size(1), r.between = x.stride(0), r.row = x.stride(1);
  return multiple(r.between) && multiple(r.row);
}

// A program takes `rows_per_program` of the rows, whose number is the one argument that follows the batch.
void launch_over(const Launch& it, int64_t rows, at::ArrayRef<const void*> slots) {
  launch(it, divided(rows, it.rows_per_program), slots, {rows});
}

// Everything but the number of rows that decides what is compiled and what it is given.
Key key_of(Operator op, const at::Tensor& x, const Rows& r, int64_t dtypes, int64_t more = 0, double number = 0) {
  return {op, x.get_device(), static_cast<int64_t>(x.scalar_type()), dtypes, r.length, r.group, r.between, r.row,
          more, std::bit_cast<int64_t>(number)};
}

bool is_weight(const at::Tensor& weight, int64_t length, const at::Tensor& x) {
  return weight.dim() == 1 && weight.size(0) == length && weight.is_contiguous() && weight.device() == x.device() &&
         weight.is_floating_point() && aligned(weight);
}

bool weight_fits(const std::optional<at::Tensor>& weight, const at::Tensor& x) { return !weight || is_weight(*weight, x.size(-1), x); }

std::vector<int64_t> statistic_sizes(const at::Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.back() = 1;
  return sizes;
}

const void* pointer(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }
bool narrow(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf || x.scalar_type() == at::kFloat;
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  Rows r;
  std::vector<int64_t> learn;
  if (narrow(x) && weight_fits(weight, x) && rows_of(x, true, r)) {
    const auto key = key_of(kRmsNorm, x, r, weight ? static_cast<int64_t>(weight->scalar_type()) : -1, 0, eps);
    if (const auto* found = find(key)) {
      const c10::cuda::CUDAGuard guard(x.device());
      auto y = empty(x, x.sizes(), x.scalar_type());
      auto rstd = empty(x, statistic_sizes(x), at::kFloat);
      launch_over(*found, r.count, {x.const_data_ptr(), nullptr, pointer(weight), y.data_ptr(), rstd.data_ptr(), nullptr});
      return {y, rstd};
    }
    learn.assign(key.begin(), key.end());
  }
  static const auto triton =
      python<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const std::optional<at::Tensor>&, double, at::IntArrayRef)>(
          "bi_compile_cuda::triton_rms_norm");
  const at::AutoDispatchBelowADInplaceOrView below;
  return triton.call(x, weight, eps, learn);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                            const std::optional<at::Tensor>& weight, double eps) {
  Rows r, other;
  std::vector<int64_t> learn;
  const bool pair = residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type() && residual.device() == x.device();
  if (pair && narrow(x) && weight_fits(weight, x) && rows_of(x, true, r) && rows_of(residual, false, other)) {
    const auto key = key_of(kAddRmsNorm, x, r, weight ? static_cast<int64_t>(weight->scalar_type()) : -1, other.between, eps);
    if (const auto* found = find(key)) {
      const c10::cuda::CUDAGuard guard(x.device());
      auto y = empty(x, x.sizes(), x.scalar_type());
      auto rstd = empty(x, statistic_sizes(x), at::kFloat);
      auto s = empty(x, x.sizes(), x.scalar_type());
      launch_over(*found, r.count,
             {x.const_data_ptr(), residual.const_data_ptr(), pointer(weight), y.data_ptr(), rstd.data_ptr(), s.data_ptr()});
      return {y, rstd, s};
    }
    learn.assign(key.begin(), key.end());
  }
  static const auto triton =
      python<std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                                            double, at::IntArrayRef)>("bi_compile_cuda::triton_add_rms_norm");
  const at::AutoDispatchBelowADInplaceOrView below;
  return triton.call(x, residual, weight, eps, learn);
}

std::tuple<at::Tensor, at::Tensor> qk_norm(const at::Tensor& qkv, const at::Tensor& q_weight, const at::Tensor& k_weight, int64_t q_heads,
                                           int64_t k_heads, double eps) {
  std::vector<int64_t> learn;
  const int64_t length = q_weight.numel();
  const bool weights = is_weight(q_weight, length, qkv) && is_weight(k_weight, length, qkv) && q_weight.scalar_type() == k_weight.scalar_type();
  if (weights && narrow(qkv) && qkv.dim() == 2 && qkv.is_contiguous() && aligned(qkv) && qkv.numel() > 0 && q_heads > 0 && k_heads > 0 &&
      multiple(length) && multiple(qkv.size(1)) && qkv.size(1) >= (q_heads + k_heads) * length) {
    const int64_t tokens = qkv.size(0), count = tokens * (q_heads + k_heads);
    const Key key{kQkNorm, qkv.get_device(), static_cast<int64_t>(qkv.scalar_type()), static_cast<int64_t>(q_weight.scalar_type()),
                  length, q_heads, k_heads, qkv.size(1), std::bit_cast<int64_t>(eps)};
    const auto* found = count <= INT32_MAX ? find(key) : nullptr;
    if (found != nullptr) {
      const c10::cuda::CUDAGuard guard(qkv.device());
      auto q = empty(qkv, {tokens, q_heads, length}, qkv.scalar_type());
      auto k = empty(qkv, {tokens, k_heads, length}, qkv.scalar_type());
      launch_over(*found, count, {qkv.const_data_ptr(), q_weight.const_data_ptr(), k_weight.const_data_ptr(), q.data_ptr(), k.data_ptr()});
      return {q, k};
    }
    learn.assign(key.begin(), key.end());
  }
  static const auto triton =
      python<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, double,
                                                at::IntArrayRef)>("bi_compile_cuda::triton_qk_norm");
  const at::AutoDispatchBelowADInplaceOrView below;
  return triton.call(qkv, q_weight, k_weight, q_heads, k_heads, eps, learn);
}

// The result's dtype where the kernel reads x as it is; undefined where x would be cast first.
std::optional<at::ScalarType> direct(const at::Tensor& x, std::optional<at::ScalarType> dtype) {
  const auto out = dtype.value_or(x.scalar_type());
  if (!narrow(x) || (out != x.scalar_type() && out != at::kFloat)) return std::nullopt;
  return out;
}

at::Tensor softmax_of(Operator op, const char* name, const at::Tensor& x, int64_t dim, std::optional<at::ScalarType> dtype) {
  Rows r;
  std::vector<int64_t> learn;
  const auto out_type = direct(x, dtype);
  if (out_type && x.dim() > 0 && (dim == -1 || dim == x.dim() - 1) && rows_of(x, false, r)) {
    const auto key = key_of(op, x, r, static_cast<int64_t>(*out_type));
    if (const auto* found = find(key)) {
      const c10::cuda::CUDAGuard guard(x.device());
      auto out = empty(x, x.sizes(), *out_type);
      launch_over(*found, r.count, {x.const_data_ptr(), out.data_ptr()});
      return out;
    }
    learn.assign(key.begin(), key.end());
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return python<at::Tensor(const at::Tensor&, int64_t, std::optional<at::ScalarType>, at::IntArrayRef)>(name).call(x, dim, dtype, learn);
}

at::Tensor softmax(const at::Tensor& x, int64_t dim, std::optional<at::ScalarType> dtype) {
  return softmax_of(kSoftmax, "bi_compile_cuda::triton_softmax", x, dim, dtype);
}

at::Tensor log_softmax(const at::Tensor& x, int64_t dim, std::optional<at::ScalarType> dtype) {
  return softmax_of(kLogSoftmax, "bi_compile_cuda::triton_log_softmax", x, dim, dtype);
}

at::Tensor sum_of(Operator op, const char* name, const at::Tensor& x, at::IntArrayRef dim, bool keepdim,
                  std::optional<at::ScalarType> dtype) {
  Rows r;
  std::vector<int64_t> learn;
  const auto out_type = direct(x, dtype);
  if (out_type && x.dim() > 0 && dim.size() == 1 && (dim[0] == -1 || dim[0] == x.dim() - 1) && rows_of(x, false, r)) {
    const auto key = key_of(op, x, r, static_cast<int64_t>(*out_type));
    if (const auto* found = find(key)) {
      const c10::cuda::CUDAGuard guard(x.device());
      auto sizes = statistic_sizes(x);
      if (!keepdim) sizes.pop_back();
      auto out = empty(x, sizes, *out_type);
      launch_over(*found, r.count, {x.const_data_ptr(), out.data_ptr()});
      return out;
    }
    learn.assign(key.begin(), key.end());
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return python<at::Tensor(const at::Tensor&, at::IntArrayRef, bool, std::optional<at::ScalarType>, at::IntArrayRef)>(name)
      .call(x, dim, keepdim, dtype, learn);
}

at::Tensor sum(const at::Tensor& x, at::IntArrayRef dim, bool keepdim, std::optional<at::ScalarType> dtype) {
  return sum_of(kSum, "bi_compile_cuda::triton_sum", x, dim, keepdim, dtype);
}

at::Tensor mean(const at::Tensor& x, at::IntArrayRef dim, bool keepdim, std::optional<at::ScalarType> dtype) {
  return sum_of(kMean, "bi_compile_cuda::triton_mean", x, dim, keepdim, dtype);
}

}  // namespace
}  // namespace bi_compile

TORCH_LIBRARY_FRAGMENT(bi_compile_cuda, m) {
  m.def("triton_rms_norm(Tensor x, Tensor? weight, float eps, int[] key) -> (Tensor, Tensor)");
  m.def("triton_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, int[] key) -> (Tensor, Tensor, Tensor)");
  m.def(
      "triton_qk_norm(Tensor qkv, Tensor q_weight, Tensor k_weight, int q_heads, int k_heads, float eps, int[] key) -> (Tensor, Tensor)");
  m.def("triton_softmax(Tensor x, int dim, ScalarType? dtype, int[] key) -> Tensor");
  m.def("triton_log_softmax(Tensor x, int dim, ScalarType? dtype, int[] key) -> Tensor");
  m.def("triton_sum(Tensor x, int[] dim, bool keepdim, ScalarType? dtype, int[] key) -> Tensor");
  m.def("triton_mean(Tensor x, int[] dim, bool keepdim, ScalarType? dtype, int[] key) -> Tensor");
}

TORCH_LIBRARY_IMPL(bi_compile, CUDA, m) {
  m.impl("rms_norm", &bi_compile::rms_norm);
  m.impl("add_rms_norm", &bi_compile::add_rms_norm);
  m.impl("qk_norm", &bi_compile::qk_norm);
  m.impl("softmax", &bi_compile::softmax);
  m.impl("log_softmax", &bi_compile::log_softmax);
  m.impl("sum", &bi_compile::sum);
  m.impl("mean", &bi_compile::mean);
}
