// Kernels of PyTorch's dispatcher, for the eager fallback, that spare a call the way through its kernel in Python.
#include "redirect.h"

namespace {

bool exact(const torch::jit::Stack& stack, size_t count) {
  for (const auto& given : torch::jit::last(stack, count))
    if (given.isTensor() && (given.toTensor().is_floating_point() || given.toTensor().is_complex())) return false;
  return true;
}

bool is_dtype(const c10::Argument& a) {
  const auto type = a.real_type();
  return type->kind() == c10::TypeKind::OptionalType && type->containedType(0)->kind() == c10::TypeKind::ScalarTypeType;
}

bool is(const c10::Argument& a, c10::TypeKind kind) { return a.type()->kind() == kind; }

// The argument of a norm that ours has not: it takes the last dimension.
constexpr size_t kNormalizedShape = 1;

bool has_shape(const c10::OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  return arguments.size() > kNormalizedShape && arguments[kNormalizedShape].name() == "normalized_shape";
}

// Whether it is the last dimension. On a CPU PyTorch rounds a mean of 16 bits, which ours leaves in 32.
bool of_rows(const c10::IValue& input, const c10::IValue& shape) {
  const auto& x = input.toTensor();
  const auto sizes = shape.toDimVector();
  return sizes.size() == 1 && x.dim() > 0 && x.size(-1) == sizes[0] && !(x.is_cpu() && x.element_size() < 4);
}

// While it is on: an operator with the same arguments in place of this one, for floating numbers. Else the kernel in Python.
// half_to_float of _softmax is a dtype to ours, no dimensions are an empty list, and a norm has no shape.
struct Redirect final : Switched {
  c10::OperatorHandle to;
  bool norm;
  size_t count;
  std::vector<size_t> dtypes, wide, dims, numbers;  // arguments that are dtypes to both, given in another form, or none to theirs alone

  Redirect(c10::SafeKernelFunction before, const c10::OperatorHandle& from, c10::OperatorHandle target)
      : Switched(std::move(before)), to(std::move(target)), norm(has_shape(from)), count(from.schema().arguments().size()) {
    for (size_t i = 0; i < count; ++i) {
      if (norm && i == kNormalizedShape) continue;
      const auto &theirs = from.schema().arguments()[i], &ours = to.schema().arguments()[i - (norm && i > kNormalizedShape)];
      if (is_dtype(ours)) (is(theirs, c10::TypeKind::BoolType) ? wide : dtypes).push_back(i);
      if (is(ours, c10::TypeKind::ListType) && is(theirs, c10::TypeKind::OptionalType)) dims.push_back(i);
      if (is(ours, c10::TypeKind::FloatType) && is(theirs, c10::TypeKind::OptionalType)) numbers.push_back(i);
    }
  }

  bool fits(const torch::jit::Stack& stack) const {
    const auto given = torch::jit::last(stack, count);
    for (const auto i : dtypes)
      if (!given[i].isNone() && !c10::isFloatingType(static_cast<c10::ScalarType>(given[i].toInt()))) return false;
    for (const auto i : numbers)
      if (given[i].isNone()) return false;
    return !exact(stack, count) && (!norm || of_rows(given[0], given[kNormalizedShape]));
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    if (!holds() || !fits(*stack)) return python.callBoxed(op, keys, stack);
    const auto given = stack->end() - static_cast<std::ptrdiff_t>(count);
    for (const auto i : wide) given[i] = given[i].toBool() ? c10::IValue(static_cast<int64_t>(c10::ScalarType::Float)) : c10::IValue();
    for (const auto i : dims)
      if (given[i].isNone()) given[i] = c10::List<int64_t>();
    if (norm) stack->erase(given + kNormalizedShape);
    to.callBoxed(stack);
  }
};

// linear without a bias, or of a matrix, as PyTorch composes it. Else the kernel in Python.
struct Linear final : c10::OperatorKernel {
  c10::SafeKernelFunction composed, python;

  Linear(c10::SafeKernelFunction before, c10::SafeKernelFunction now) : composed(std::move(before)), python(std::move(now)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const auto given = torch::jit::last(*stack, 3);
    const bool plain = given[2].isNone() || given[0].toTensor().dim() <= 2;
    (plain ? composed : python).callBoxed(op, keys, stack);
  }
};

}  // namespace

extern "C" {
// Calls of `name` under the dispatch key go to the operator `target` while the switch that is returned is on.
BI_COMPILE_EXPORT PyObject* bi_compile_redirect(const char* name, const char* overload, const char* key, const char* target) {
  HANDLE_TH_ERRORS
  const auto op = find(name, overload), to = find(target);
  TORCH_CHECK(op.schema().arguments().size() == to.schema().arguments().size() + has_shape(op), name, " and ", target,
              " differ in their arguments");
  const auto dispatch_key = c10::parseDispatchKey(key);
  auto* kernel = put_in(op, dispatch_key, std::make_unique<Redirect>(op.getComputedKernelForDispatchKey(dispatch_key), op, to));
  return PyLong_FromVoidPtr(&kernel->on);
  END_HANDLE_TH_ERRORS
}

// What computes `name` under the dispatch key now, for `bi_compile_linear` and `bi_compile_whole`; called before there is a kernel in Python.
BI_COMPILE_EXPORT PyObject* bi_compile_native(const char* name, const char* overload, const char* key) {
  HANDLE_TH_ERRORS
  return PyLong_FromVoidPtr(new c10::SafeKernelFunction(find(name, overload).getComputedKernelForDispatchKey(c10::parseDispatchKey(key))));
  END_HANDLE_TH_ERRORS
}

BI_COMPILE_EXPORT PyObject* bi_compile_linear(void* composed) {
  HANDLE_TH_ERRORS
  const auto op = find("aten::linear");
  put_in(op, c10::DispatchKey::CompositeImplicitAutograd,
         std::make_unique<Linear>(*static_cast<c10::SafeKernelFunction*>(composed), op.getComputedKernelForDispatchKey(c10::DispatchKey::CPU)));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

BI_COMPILE_EXPORT void bi_compile_switch(void* switch_, bool on) { *static_cast<std::atomic<bool>*>(switch_) = on; }

BI_COMPILE_EXPORT void bi_compile_switch_all(bool on) { any_on = on; }

BI_COMPILE_EXPORT void bi_compile_own(bool has) { own = has; }
}
