// mm and addmm by the Triton kernel: what cuBLASLt does not compute, or not as fast.
#include "launches.h"

namespace bi_compile {
namespace {

// Everything that decides what is compiled and launched, but for pointers. False where Triton's function has to look at the operands.
bool key_of(const at::Tensor& a, const at::Tensor& b, const at::Tensor* bias, Key& key) {
  const auto type = a.scalar_type();
  if (a.dim() != 2 || b.dim() != 2 || b.scalar_type() != type || b.device() != a.device()) return false;
  if (type != at::kBFloat16 && type != at::kHalf && type != at::kFloat) return false;
  if (a.numel() == 0 || b.numel() == 0 || b.size(0) != a.size(1) || !aligned(a) || !aligned(b)) return false;
  key = {kProduct,    a.get_device(), static_cast<int64_t>(type), a.size(0),   b.size(1), a.size(1),
         a.stride(0), a.stride(1),    b.stride(0),                b.stride(1), -1};
  if (bias == nullptr) return true;
  if (bias->scalar_type() != type || bias->device() != a.device() || bias->dim() > 2 || !aligned(*bias)) return false;
  key[10] = bias->dim();
  for (int64_t i = 0; i < bias->dim(); ++i) key[11 + 2 * i] = bias->size(i), key[12 + 2 * i] = bias->stride(i);
  return true;
}

}  // namespace

at::Tensor triton_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor* bias, const at::Scalar& beta,
                          const at::Scalar& alpha) {
  Key key;
  std::vector<int64_t> learn;
  if (beta.equal(1) && alpha.equal(1) && key_of(a, b, bias, key)) {
    if (const auto* found = find(key)) {
      const c10::cuda::CUDAGuard guard(a.device());
      auto out = empty(a, {a.size(0), b.size(1)}, a.scalar_type());
      launch(*found, found->programs, {a.const_data_ptr(), b.const_data_ptr(), bias == nullptr ? nullptr : bias->const_data_ptr(), out.data_ptr()},
             {a.size(0), found->programs});
      return out;
    }
    learn.assign(key.begin(), key.end());
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  if (bias == nullptr) {
    static const auto mm = python<at::Tensor(const at::Tensor&, const at::Tensor&, at::IntArrayRef)>("bi_compile_cuda::triton_mm");
    return mm.call(a, b, learn);
  }
  static const auto addmm =
      python<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Scalar&, const at::Scalar&, at::IntArrayRef)>(
          "bi_compile_cuda::triton_addmm");
  return addmm.call(*bias, a, b, beta, alpha, learn);
}

}  // namespace bi_compile

TORCH_LIBRARY_FRAGMENT(bi_compile_cuda, m) {
  m.def("triton_mm(Tensor a, Tensor b, int[] key) -> Tensor");
  m.def("triton_addmm(Tensor bias, Tensor a, Tensor b, Scalar beta, Scalar alpha, int[] key) -> Tensor");
}
