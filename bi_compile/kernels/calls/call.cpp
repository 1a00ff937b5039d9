// A call of an operator from Python, past PyTorch's general way through pybind11 and TorchScript's interpreter.
//
// It takes plain tensors, numbers, dtypes and lists of integers, and hands them to the dispatcher as the general way does. Whatever
// else it is given (a subclass of Tensor, a symbolic number, a missing argument, a mode for torch functions) goes to the general way.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <vector>

namespace {

enum class Kind { kTensor, kFloat, kInt, kBool, kInts, kDtype, kNumber };

struct Argument {
  PyObject* name;  // interned
  Kind kind;
  bool optional;
  std::optional<c10::IValue> otherwise;  // its default
};

constexpr size_t kMost = 24;

struct Call {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject* general;
  c10::OperatorHandle* op;
  std::vector<Argument>* arguments;
  size_t positional;  // those behind are given by name
};

std::optional<Kind> kind_of(const c10::Type& type, const c10::Type& real) {
  // TorchScript's type of a dtype is int
  if (real.kind() == c10::TypeKind::ScalarTypeType) return Kind::kDtype;
  switch (type.kind()) {
    case c10::TypeKind::TensorType: return Kind::kTensor;
    case c10::TypeKind::FloatType: return Kind::kFloat;
    case c10::TypeKind::IntType: return real.kind() == c10::TypeKind::IntType ? std::optional(Kind::kInt) : std::nullopt;
    case c10::TypeKind::BoolType: return Kind::kBool;
    case c10::TypeKind::NumberType: return Kind::kNumber;
    case c10::TypeKind::ListType: {
      const bool ints = type.containedType(0)->kind() == c10::TypeKind::IntType && real.containedType(0)->kind() == c10::TypeKind::IntType;
      return ints ? std::optional(Kind::kInts) : std::nullopt;
    }
    default: return std::nullopt;
  }
}

// Up to PyTorch 2.12 or so dimensions may have names, which the general way refuses.
template <class T>
bool named(const T& tensor) {
  if constexpr (requires { tensor.has_names(); }) return tensor.has_names();
  return false;
}

bool integer(PyObject* given, int64_t& value) {
  if (!PyLong_CheckExact(given)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(given, &overflow);
  return overflow == 0;
}

// False where the general way has to look at it.
bool push(const Argument& argument, PyObject* given, torch::jit::Stack& stack) {
  if (given == nullptr) {
    if (!argument.otherwise) return false;
    stack.push_back(*argument.otherwise);
    return true;
  }
  if (given == Py_None) {
    if (!argument.optional) return false;
    stack.emplace_back();
    return true;
  }
  int64_t number = 0;
  switch (argument.kind) {
    case Kind::kTensor: {
      if (!THPVariable_CheckExact(given)) return false;
      const auto& tensor = THPVariable_Unpack(given);
      if (named(tensor)) return false;
      stack.emplace_back(tensor);
      return true;
    }
    case Kind::kNumber:
    case Kind::kFloat:
      if (PyFloat_CheckExact(given)) {
        stack.emplace_back(PyFloat_AS_DOUBLE(given));
        return true;
      }
      if (argument.kind == Kind::kFloat || !integer(given, number)) return false;
      stack.emplace_back(number);
      return true;
    case Kind::kInt:
      if (!integer(given, number)) return false;
      stack.emplace_back(number);
      return true;
    case Kind::kBool:
      if (given != Py_True && given != Py_False) return false;
      stack.emplace_back(given == Py_True);
      return true;
    case Kind::kDtype:
      if (!THPDtype_Check(given)) return false;
      stack.emplace_back(static_cast<int64_t>(reinterpret_cast<THPDtype*>(given)->scalar_type));
      return true;
    case Kind::kInts: {
      if (!PyList_CheckExact(given) && !PyTuple_CheckExact(given)) return false;
      c10::List<int64_t> list;
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(given); ++i) {
        if (!integer(PySequence_Fast_GET_ITEM(given, i), number)) return false;
        list.push_back(number);
      }
      stack.emplace_back(std::move(list));
      return true;
    }
  }
  return false;
}

// Each argument's place gets what was given for it. False where the general way has to say what is wrong.
bool place(const Call& call, PyObject* const* args, size_t count, PyObject* names, std::array<PyObject*, kMost>& given) {
  if (count > call.positional) return false;
  std::copy(args, args + count, given.begin());
  for (Py_ssize_t n = 0; names != nullptr && n < PyTuple_GET_SIZE(names); ++n) {
    size_t i = count;
    while (i < call.arguments->size() && (*call.arguments)[i].name != PyTuple_GET_ITEM(names, n)) ++i;
    if (i == call.arguments->size()) return false;
    given[i] = args[count + n];
  }
  return true;
}

PyObject* results(torch::jit::Stack& stack) {
  if (stack.size() == 1) return THPVariable_Wrap(std::move(stack[0]).toTensor());
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(stack.size()));
  for (size_t i = 0; tuple != nullptr && i < stack.size(); ++i) {
    PyObject* one = THPVariable_Wrap(std::move(stack[i]).toTensor());
    if (one == nullptr) {
      Py_DECREF(tuple);
      return nullptr;
    }
    PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), one);
  }
  return tuple;
}

// The interpreter's lock is another thread's meanwhile. pybind11's own way takes 0.1 us more.
struct Released {
  PyThreadState* const thread = PyEval_SaveThread();
  ~Released() { PyEval_RestoreThread(thread); }
};

// As the general way, it leaves C++ warnings where they go: PyTorch's HANDLE_TH_ERRORS would make Python's of them.
PyObject* run(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  const auto& call = *reinterpret_cast<Call*>(self);
  try {
    std::array<PyObject*, kMost> given{};
    torch::jit::Stack stack;
    stack.reserve(kMost);
    bool plain = !at::impl::torch_function_mode_enabled() && place(call, args, PyVectorcall_NARGS(flags), names, given);
    for (size_t i = 0; plain && i < call.arguments->size(); ++i) plain = push((*call.arguments)[i], given[i], stack);
    if (plain) {
      {
        const Released released;
        call.op->callBoxed(stack);
      }
      return results(stack);
    }
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
  return PyObject_Vectorcall(call.general, args, flags, names);
}

void destroy(PyObject* self) {
  auto& call = *reinterpret_cast<Call*>(self);
  for (auto& argument : *call.arguments) Py_DECREF(argument.name);
  Py_DECREF(call.general);
  delete call.op;
  delete call.arguments;
  Py_TYPE(self)->tp_free(self);
}

// An OpOverload is hashed by what it calls.
Py_hash_t hash(PyObject* self) { return PyObject_Hash(reinterpret_cast<Call*>(self)->general); }

PyObject* attribute(PyObject* self, PyObject* name) { return PyObject_GetAttr(reinterpret_cast<Call*>(self)->general, name); }

PyTypeObject* type() {
  static PyTypeObject it = [] {
    PyTypeObject t{PyVarObject_HEAD_INIT(nullptr, 0)};
    t.tp_name = "bi_compile.kernels.calls.Call";
    t.tp_basicsize = sizeof(Call);
    t.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
    t.tp_vectorcall_offset = offsetof(Call, vectorcall);
    t.tp_call = PyVectorcall_Call;
    t.tp_dealloc = destroy;
    t.tp_hash = hash;
    t.tp_getattro = attribute;
    return t;
  }();
  static const bool ready = PyType_Ready(&it) == 0;
  return ready ? &it : nullptr;
}

}  // namespace

// What calls the operator `name`, whose only overload it is, in place of `general`; None where an argument or a result is of a kind
// that is not taken here.
extern "C" __attribute__((visibility("default"))) PyObject* bi_compile_call(PyObject* general, const char* name) {
  HANDLE_TH_ERRORS
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  const auto& schema = op.schema();
  std::vector<Argument> arguments;
  size_t positional = 0;
  for (const auto& a : schema.arguments()) {
    const bool optional = a.type()->kind() == c10::TypeKind::OptionalType;
    const auto inner = [&](const c10::TypePtr& t) { return optional ? t->containedType(0) : t; };
    const auto kind = kind_of(*inner(a.type()), *inner(a.real_type()));
    if (!kind || schema.arguments().size() > kMost) Py_RETURN_NONE;
    positional += !a.kwarg_only();
    arguments.push_back({nullptr, *kind, optional, a.default_value()});
  }
  for (const auto& r : schema.returns())
    if (r.type()->kind() != c10::TypeKind::TensorType) Py_RETURN_NONE;
  if (schema.returns().empty()) Py_RETURN_NONE;
  auto* self = type() == nullptr ? nullptr : PyObject_New(Call, type());
  if (self == nullptr) return nullptr;
  for (size_t i = 0; i < arguments.size(); ++i) arguments[i].name = PyUnicode_InternFromString(schema.arguments()[i].name().c_str());
  self->vectorcall = run;
  self->general = Py_NewRef(general);
  self->op = new c10::OperatorHandle(op);
  self->arguments = new std::vector<Argument>(std::move(arguments));
  self->positional = positional;
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}
