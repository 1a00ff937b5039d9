// Pointwise operators of the eager fallback on a CPU that spare a call the way through its kernel in Python: what `ops/pointwise.py` does, by
// all threads.
#include "redirect.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>

#include <cstring>

namespace {

constexpr int64_t kVectors = 64;              // elements: a multiple of every vector
constexpr int64_t kAlone = 16384 - kVectors;  // no function shares so many among threads, as CHUNK in ops/pointwise.py
constexpr int64_t kMost = 65536;              // a thread computes so many at a time, whose result its cache keeps

// The tensors among an operator's arguments, where they are floating numbers of one dtype and size, one element behind the other.
bool tensors_of(at::ArrayRef<c10::IValue> given, std::vector<size_t>& found) {
  const at::Tensor* first = nullptr;
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i].isComplexDouble()) return false;
    if (!given[i].isTensor()) continue;
    const auto& x = given[i].toTensor();
    if (!x.defined() || !x.is_cpu() || !x.is_floating_point() || !x.is_contiguous() || x.is_neg() || x.numel() == 0) return false;
    if (first == nullptr) first = &x;
    if (x.scalar_type() != first->scalar_type() || x.sizes() != first->sizes()) return false;
    found.push_back(i);
  }
  return first != nullptr;
}

// While other threads compute: one of them may come to an operator's kernel in Python, and would wait for this one for ever.
struct Released {
  PyThreadState* const held = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  ~Released() {
    if (held != nullptr) PyEval_RestoreThread(held);
  }
};

// While it is on: PyTorch's kernel on whole vectors, of which each thread takes some. Else the kernel in Python.
struct Whole final : Switched {
  c10::SafeKernelFunction native;
  size_t count;

  Whole(c10::SafeKernelFunction before, c10::SafeKernelFunction now, const c10::OperatorHandle& op)
      : Switched(std::move(now)), native(std::move(before)), count(op.schema().arguments().size()) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    std::vector<size_t> tensors;
    if (!holds() || !tensors_of(torch::jit::last(*stack, count), tensors)) return python.callBoxed(op, keys, stack);
    const auto first = torch::jit::last(*stack, count)[tensors[0]].toTensor();
    const int64_t n = first.numel(), whole = n / kVectors * kVectors, size = static_cast<int64_t>(first.element_size());
    if (n == whole && n <= kAlone) return native.callBoxed(op, keys, stack);
    const auto out = at::empty(first.sizes(), first.options(), at::MemoryFormat::Contiguous);
    // the function of `many` elements from `begin` on, of which `there` are given and the others are 1
    const auto compute = [&](int64_t begin, int64_t many, int64_t there) {
      torch::jit::Stack mine(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
      for (const auto i : tensors) {
        char* from = static_cast<char*>(const_cast<void*>(mine[i].toTensor().const_data_ptr())) + begin * size;
        if (there == many) {
          mine[i] = at::from_blob(from, {many}, first.options());
        } else {
          const auto filled = at::ones({many}, first.options());
          std::memcpy(filled.mutable_data_ptr(), from, there * size);
          mine[i] = filled;
        }
      }
      native.callBoxed(op, keys, &mine);
      const auto& result = mine.back().toTensor();
      TORCH_INTERNAL_ASSERT(result.scalar_type() == first.scalar_type() && result.is_contiguous(), op.schema());
      std::memcpy(static_cast<char*>(out.mutable_data_ptr()) + begin * size, result.const_data_ptr(), there * size);
    };
    const Released released;
    // a kernel within a thread of these does not share its work
    at::parallel_for(0, whole / kVectors, kAlone / kVectors, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below;
      for (int64_t i = begin * kVectors; i < end * kVectors; i += kMost) {
        const int64_t many = std::min(kMost, end * kVectors - i);
        compute(i, many, many);
      }
    });
    if (whole < n) compute(whole, kVectors, n - whole);
    torch::jit::drop(*stack, count);
    stack->emplace_back(out);
  }
};

}  // namespace

extern "C" {

// Calls of `name` go to `native` on whole vectors while the switch that is returned is on.
BI_COMPILE_EXPORT PyObject* bi_compile_whole(const char* name, const char* overload, const char* key, void* native) {
  HANDLE_TH_ERRORS
  const auto op = find(name, overload);
  const auto dispatch_key = c10::parseDispatchKey(key);
  const std::unique_ptr<c10::SafeKernelFunction> before(static_cast<c10::SafeKernelFunction*>(native));
  auto* kernel = put_in(op, dispatch_key, std::make_unique<Whole>(std::move(*before), op.getComputedKernelForDispatchKey(dispatch_key), op));
  return PyLong_FromVoidPtr(&kernel->on);
  END_HANDLE_TH_ERRORS
}
}
