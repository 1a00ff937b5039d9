// Norms, softmax and sums over rows: launches of kernels that Triton compiled, without Python.
//
// The first call of each layout goes to the function in Python, which compiles and runs the kernel and tells `learn` what
// it launched. Later calls launch the same binary with the same arguments but for pointers and the number of rows.
#include "common.h"

#include <cuda.h>
#include <dlfcn.h>

#include <array>
#include <bit>
#include <shared_mutex>
#include <unordered_map>

namespace bi_compile {
namespace {

using Key = std::array<int64_t, 10>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 14695981039346656037u;
    for (const auto part : key) h = (h ^ static_cast<uint64_t>(part)) * 1099511628211u;
    return h ^ (h >> 29);
  }
};

// What an argument of the kernel is: a number of `slots` (a pointer), the number of rows, or a constant.
enum Kind : int64_t { kSlot = 0, kRows = 1, kConstant = 2 };

struct Launch {
  CUfunction function = nullptr;
  unsigned threads = 0, shared = 0;
  int64_t rows_per_program = 0;
  std::vector<std::pair<int64_t, int64_t>> arguments;  // kind, value
};

constexpr size_t kMostArguments = 24;
std::shared_mutex table_lock;
std::unordered_map<Key, Launch, KeyHash> table;

// The driver, which PyTorch has loaded already.
void* driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library == nullptr ? nullptr : dlsym(library, name);
  TORCH_CHECK(found != nullptr, "the CUDA driver has no ", name, ": bi_compile needs driver 550 or newer");
  return found;
}

const Launch* find(const Key& key) {
  std::shared_lock lock(table_lock);
  const auto it = table.find(key);
  return it == table.end() ? nullptr : &it->second;  // elements stay where they are, and none is removed
}

void launch(const Launch& it, int64_t rows, std::initializer_list<const void*> slots) {
  static const auto run = reinterpret_cast<decltype(&cuLaunchKernel)>(driver("cuLaunchKernel"));
  std::array<uint64_t, kMostArguments> values;
  std::array<void*, kMostArguments> pointers;
  for (size_t i = 0; i < it.arguments.size(); ++i) {
    const auto [kind, value] = it.arguments[i];
    values[i] = kind == kSlot ? reinterpret_cast<uint64_t>(slots.begin()[value]) : static_cast<uint64_t>(kind == kRows ? rows : value);
    pointers[i] = &values[i];
  }
  const auto programs = (rows + it.rows_per_program - 1) / it.rows_per_program;
  const auto status = run(it.function, static_cast<unsigned>(programs), 1, 1, it.threads, 1, 1, it.shared,
                          c10::cuda::getCurrentCUDAStream(), pointers.data(), nullptr);
  TORCH_CHECK(status == CUDA_SUCCESS, "launching a kernel over ", rows, " rows failed with CUDA driver error ", int(status));
}

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

enum Operator : int64_t { kRmsNorm = 0, kAddRmsNorm = 1, kSoftmax = 2, kLogSoftmax = 3, kSum = 4, kMean = 5 };

// Everything but the number of rows that decides what is compiled and what it is given.
Key key_of(Operator op, const at::Tensor& x, const Rows& r, int64_t dtypes, int64_t more = 0, double number = 0) {
  return {op, x.get_device(), static_cast<int64_t>(x.scalar_type()), dtypes, r.length, r.group, r.between, r.row,
          more, std::bit_cast<int64_t>(number)};
}

bool weight_fits(const std::optional<at::Tensor>& weight, const at::Tensor& x) {
  return !weight || (weight->dim() == 1 && weight->size(0) == x.size(-1) && weight->is_contiguous() &&
                     weight->device() == x.device() && weight->is_floating_point() && aligned(*weight));
}

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
      launch(*found, r.count, {x.const_data_ptr(), nullptr, pointer(weight), y.data_ptr(), rstd.data_ptr(), nullptr});
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
      launch(*found, r.count,
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
      launch(*found, r.count, {x.const_data_ptr(), out.data_ptr()});
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
      launch(*found, r.count, {x.const_data_ptr(), out.data_ptr()});
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

// Calls with this key launch `function` from now on. sizes: bytes of each argument. What the binary takes behind them are
// Triton's scratch pointers, which are null. Raises where the binary does not take these.
void learn(const std::vector<int64_t>& key, int64_t function, int64_t threads, int64_t shared, int64_t rows_per_program,
           const std::vector<int64_t>& kinds, const std::vector<int64_t>& values, const std::vector<int64_t>& sizes) {
  static const auto parameter = reinterpret_cast<decltype(&cuFuncGetParamInfo)>(driver("cuFuncGetParamInfo"));
  Key as;
  TORCH_CHECK(key.size() == as.size() && kinds.size() == values.size() && kinds.size() == sizes.size() && rows_per_program > 0);
  std::copy(key.begin(), key.end(), as.begin());
  Launch it{reinterpret_cast<CUfunction>(function), static_cast<unsigned>(threads), static_cast<unsigned>(shared), rows_per_program, {}};
  size_t offset = 0, size = 0;
  for (size_t i = 0; parameter(it.function, i, &offset, &size) == CUDA_SUCCESS; ++i) {
    TORCH_CHECK(i < kMostArguments, "a kernel with more than ", kMostArguments, " arguments");
    const bool known = i < kinds.size();
    TORCH_CHECK(size == (known ? static_cast<size_t>(sizes[i]) : sizeof(void*)), "argument ", i, " of the kernel has ", size, " bytes");
    it.arguments.emplace_back(known ? kinds[i] : static_cast<int64_t>(kConstant), known ? values[i] : 0);
  }
  TORCH_CHECK(it.arguments.size() >= kinds.size(), "the kernel takes ", it.arguments.size(), " arguments, not ", kinds.size());
  std::unique_lock lock(table_lock);
  table.try_emplace(as, std::move(it));
}

}  // namespace
}  // namespace bi_compile

TORCH_LIBRARY_FRAGMENT(bi_compile_cuda, m) {
  m.def("triton_rms_norm(Tensor x, Tensor? weight, float eps, int[] key) -> (Tensor, Tensor)");
  m.def("triton_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, int[] key) -> (Tensor, Tensor, Tensor)");
  m.def("triton_softmax(Tensor x, int dim, ScalarType? dtype, int[] key) -> Tensor");
  m.def("triton_log_softmax(Tensor x, int dim, ScalarType? dtype, int[] key) -> Tensor");
  m.def("triton_sum(Tensor x, int[] dim, bool keepdim, ScalarType? dtype, int[] key) -> Tensor");
  m.def("triton_mean(Tensor x, int[] dim, bool keepdim, ScalarType? dtype, int[] key) -> Tensor");
  m.def("learn(int[] key, int function, int threads, int shared, int rows_per_program, int[] kinds, int[] values, int[] sizes) -> ()",
        &bi_compile::learn);
}

TORCH_LIBRARY_IMPL(bi_compile, CUDA, m) {
  m.impl("rms_norm", &bi_compile::rms_norm);
  m.impl("add_rms_norm", &bi_compile::add_rms_norm);
  m.impl("softmax", &bi_compile::softmax);
  m.impl("log_softmax", &bi_compile::log_softmax);
  m.impl("sum", &bi_compile::sum);
  m.impl("mean", &bi_compile::mean);
}
