// Operators whose functions in Triton do nothing but allocate and launch: the first two calls with such arguments are made by Python, which
// records the second one, later ones from here.
#pragma once

#include "launches.h"

#include <ATen/core/boxing/OperatorKernel.h>
#include <ATen/core/stack.h>

namespace bi_compile {

class Recorded final : public c10::OperatorKernel {
 public:
  // `operators` in recorded.py has a function for bi_compile_cuda::record_<name>, which is there before this library is loaded.
  explicit Recorded(const std::string& name)
      : python_(c10::Dispatcher::singleton().findSchemaOrThrow(("bi_compile_cuda::record_" + name).c_str(), "")) {}

  // Takes the operator's arguments from the stack and leaves its results.
  void call(torch::jit::Stack& stack);
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) { call(*stack); }

 private:
  const c10::OperatorHandle python_;
};

}  // namespace bi_compile
