// Operators whose functions in Triton do nothing but allocate and launch: the first two calls with such arguments are made by Python, which
// records the second one, later ones from here.
#pragma once

#include "launches.h"

#include <ATen/core/boxing/OperatorKernel.h>
#include <ATen/core/stack.h>

namespace bi_compile {

class Recorded final : public c10::OperatorKernel {
 public:
  // The operator bi_compile_cuda::record_<name>, for which `operators` in recorded.py has a function.
  explicit Recorded(std::string name) : name_("bi_compile_cuda::record_" + std::move(name)) {}

  // Takes the operator's arguments from the stack and leaves its results.
  void call(torch::jit::Stack& stack);
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) { call(*stack); }

 private:
  std::string name_;
  std::once_flag once_;
  std::optional<c10::OperatorHandle> python_;
};

}  // namespace bi_compile
