// What the kernels that stand before the eager fallback's kernels in Python have in common.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/Exceptions.h>

#include <atomic>
#include <memory>
#include <vector>

#define BI_COMPILE_EXPORT __attribute__((visibility("default")))

// Whether this thread has fallbacks of its own, which only Python knows.
inline thread_local bool own = false;
// Whether any switch counts.
inline std::atomic<bool> any_on = false;

// A kernel that holds while its switch is on, and else leaves a call to the kernel in Python below it.
struct Switched : c10::OperatorKernel {
  c10::SafeKernelFunction python;
  std::atomic<bool> on = false;

  explicit Switched(c10::SafeKernelFunction below) : python(std::move(below)) {}
  bool holds() const { return any_on && on && !own; }
};

// It stays for the life of the process, like the kernel in Python below it.
template <class Kernel>
Kernel* put_in(const c10::OperatorHandle& op, c10::DispatchKey key, std::unique_ptr<Kernel> kernel) {
  Kernel* const found = kernel.get();
  new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().registerImpl(
      op.operator_name(), key, c10::KernelFunction::makeFromBoxedFunctor(std::move(kernel)), std::nullopt, nullptr, "bi_compile"));
  return found;
}

inline c10::OperatorHandle find(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
}
