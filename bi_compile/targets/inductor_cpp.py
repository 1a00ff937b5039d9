"""One code for each function in what Inductor generates for a CPU.

Inductor writes a pointwise loop in vector code, in scalar code, or in vector code with a scalar end. Which, follows the
shapes: the innermost size, the strides, how many of the operators are masks (`TilingSelect` and `_tail_vec_worthwhile` in
torch/_inductor/codegen/cpp.py). exp and its like are libm in scalar code and Sleef in vector code, which round differently,
so a row's bits would follow its neighbours. Here both codes compute such a function with one routine:

- scalar code calls the vector routine on one lane. So for every function that has vector code of its own and is not exact
  by IEEE 754 (`EXACT`), also for those that a later torch adds. Vector code, where nearly all the time is spent, stays.
  So are maximum, minimum and relu, whose scalar code may give another of two zeros.
- sin, cos and tan are libm in vector code too, lane by lane: Sleef reduces the arguments of a whole vector by another
  method where one of them is large, so a lane's bits follow the lanes beside it (measured, torch 2.13, AVX-512: sin of
  680 and cos of 910 of 16384 float32 differ among others of up to 1000).

Why so, and not by settings: `cpp.simdlen=1` leaves scalar code alone, at the cost of all vectors; without
`cpp.enable_tiling_heuristics` and with `cpp.enable_loop_tail_vec` some loops stay scalar (types that have no vectors, indirect
and strided loads, scalars broadcast into vector code). What is changed are the tables that Inductor keeps for this purpose,
`CppOverrides` and `CppVecOverrides` (there from torch 2.1 to 2.14), and only for graphs that `one_code` was called with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import OptionError

#: functions of vector code whose result IEEE 754 or their meaning fixes to the bit, so scalar code gives the same
EXACT = frozenset(
    (
        "add sub mul truediv abs sqrt eq ne lt gt le ge and_ round floor ceil trunc neg square sign reciprocal "
        "where copysign nextafter frexp fma "
        "logical_and logical_not logical_or logical_xor bitwise_and bitwise_not bitwise_or bitwise_xor "
        "bitwise_left_shift bitwise_right_shift truncdiv floordiv to_dtype to_dtype_bitcast round_to_int masked index_expr value_expr "
        "load_seed rand randn randint64 rand_eager"
    ).split()
)
#: functions whose vector routine looks at more than one lane
SCALAR = ("cos", "sin", "tan")
#: settings of `torch._inductor.config.cpp` that keep GCC's flags -funsafe-math-optimizations and -ffp-contract=fast away
ROUNDED_AS_WRITTEN = {"enable_unsafe_math_opt_flag": False, "enable_floating_point_contract_flag": "off"}
_MARK = "bi_compile.one_code"


def one_code(graph: fx.Graph) -> None:
    """Have Inductor compute each function by one routine in the code that it will generate for `graph`.

    Raises:
        OptionError: Inductor is set to generate something else than C++ for a CPU, or to let the C++ compiler round otherwise.
    """
    from torch._inductor import config

    if config.cpu_backend != "cpp":
        raise OptionError(
            f"torch._inductor.config.cpu_backend is {config.cpu_backend!r}, whose code for a CPU is not known to compute a row "
            'alike at every place: set it to "cpp"'
        )
    for name, needed in ROUNDED_AS_WRITTEN.items():
        if getattr(config.cpp, name, needed) != needed:
            raise OptionError(
                f"torch._inductor.config.cpp.{name} is {getattr(config.cpp, name)!r}, with which the C++ compiler may round an operation "
                f"in one loop and not in another: set it to {needed!r}"
            )
    _install()
    if graph.owning_module is not None:
        graph.owning_module.meta[_MARK] = True


def vector_instructions() -> str:
    """The vector instructions that Inductor generates code for, which ATEN_CPU_CAPABILITY and `cpp.simdlen` change."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa())


def _wanted() -> bool:
    """Whether the graph for which code is generated now, or one that holds it, was marked."""
    from torch._inductor.virtualized import V

    graph: Any = V.graph
    while isinstance(graph, torch.fx.Interpreter):
        module: Any = graph.module
        if module.meta.get(_MARK):
            return True
        graph = getattr(graph, "parent", None)
    return False


@functools.cache
def _install() -> None:
    """Put the functions into Inductor's tables; each asks `_wanted` when code is generated."""
    from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides

    for name, method in list(vars(CppVecOverrides).items()):
        # what Inductor itself computes lane by lane in scalar code has one code already
        own = isinstance(method, staticmethod) and "_scalarize" not in method.__func__.__qualname__
        scalar = getattr(CppOverrides, name, None)
        if not own or scalar is None or name in EXACT or name.startswith("_"):
            continue
        if name in SCALAR:
            by_lane = CppVecOverrides._scalarize(scalar)
            setattr(CppVecOverrides, name, staticmethod(_chosen(by_lane, method.__func__, name)))
        else:
            setattr(CppOverrides, name, staticmethod(_chosen(_one_lane(method.__func__, scalar), scalar, name)))


def _chosen(ours: Callable[..., Any], theirs: Callable[..., Any], name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return (ours if _wanted() else theirs)(*args, **kwargs)

    function.__name__ = name  # Inductor finds the scalar form of a function by it
    return function


class _Lane(str):
    """The name of a vector in the generated code, with the dtype that its functions ask for."""

    dtype: torch.dtype


def _one_lane(vector: Callable[..., Any], scalar: Callable[..., Any]) -> Callable[..., Any]:
    """Scalar code for a function: the vector routine, of which one lane is kept."""

    def function(*args: Any) -> Any:
        from torch._inductor.cpu_vec_isa import pick_vec_isa
        from torch._inductor.utils import IndentedBuffer

        from torch._inductor.codegen.cpp import BracesBuffer  # isort: skip

        floats = all(getattr(a, "dtype", None) is not None and a.dtype.is_floating_point for a in args)
        if not floats or not pick_vec_isa():  # integers; or all code is scalar
            return scalar(*args)
        code, lanes = BracesBuffer(), []
        code.writeline("[&]()")
        with code.indent():
            code.writeline(f"using T = std::decay_t<decltype({args[0]})>;")
            code.writeline("using V = at::vec::Vectorized<T>;")
            for i, a in enumerate(args):
                lane = _Lane(f"lane{i}")
                lane.dtype = a.dtype
                lanes.append(lane)
                code.writeline(f"const V {lane}(static_cast<T>({a}));")
            code.writeline("const V vector =")
            result = vector(*lanes)
            if isinstance(result, IndentedBuffer):
                code.splice(result)
                code.writeline(";")
            else:
                code.writeline(f"{result};")
            code.writeline("__at_align__ std::array<T, V::size()> out;")
            code.writeline("vector.store(out.data());")
            code.writeline("return out[0];")
        code.writeline("()")
        return code

    return function
