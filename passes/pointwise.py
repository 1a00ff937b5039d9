"""Pointwise functions that a CPU computes differently by an element's place in memory."""

import functools
from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, find_operator, refuse

aten = torch.ops.aten
#: eager code on a CPU
EAGER = ["cpu_eager"]


def _not_float(*args: Any, **kwargs: Any) -> bool:
    return not any(isinstance(a, Tensor) and a.is_floating_point() for a in args)


def _makes_no_float(op: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether the operator makes integers of integers."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if all(t.is_floating_point() or t.is_complex() for t in tensors):
        return False
    return _integers_of(op, tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items()))


def _kind(value: Any) -> Any:
    """What of an argument decides the dtype of the result: dtype and whether it has dimensions, or a number's type."""
    if isinstance(value, Tensor):
        return value.dtype, min(value.dim(), 1)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return int if isinstance(value, torch.SymInt) else float
    return type(value) if isinstance(value, (int, float, complex)) else value


@functools.cache  # asked at every call of eager code
def _integers_of(op: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    def like(kind: Any) -> Any:
        if isinstance(kind, tuple):
            return torch.empty([0] * kind[1], dtype=kind[0], device="meta")
        return kind(1) if isinstance(kind, type) else kind

    made: Tensor = op.overloadpacket(*map(like, args), **{name: like(kind) for name, kind in kwargs})
    return not made.is_floating_point() and not made.is_complex()


def _not_complex(*args: Any, **kwargs: Any) -> bool:
    """Nothing is complex."""
    return not any(isinstance(a, complex) or (isinstance(a, Tensor) and a.is_complex()) for a in args)


def _square(self: Any, exponent: Any) -> bool:
    """Whether the power is a product of real numbers with themselves, or no floating-point function at all."""
    return (exponent == 2 and not self.is_complex()) or _makes_no_float(aten.pow.Tensor_Scalar, self, exponent)


def _plain_sum(self: Tensor, other: Any, alpha: float = 1) -> bool:
    return alpha == 1 or _not_float(self, other)


class Pointwise(Pass):
    """Functions computed in vector code at every place."""

    name = "pointwise"
    why = "vector and scalar code round differently, and which one computes an element follows the number of elements, strides and threads"
    source = "measured by `bi_compile.measure.pointwise`: rows of 208 functions alone and among others, torch 2.13, AVX-512; aten/src/ATen/native/cpu/Loops.h (vectorized_loop)"


#: operators that were measured to vary in eager code, and their like; maximum, minimum and clamp by the sign of zero
VARY = (
    "acosh asinh atan2 atanh celu cosh digamma elu erfinv exp2 expm1 fmod.Scalar fmod.Tensor gelu gelu_backward hypot i0 igamma igammac "
    "lgamma logaddexp logaddexp2 logit logit_backward mish polygamma pow.Scalar pow.Tensor_Tensor remainder.Scalar "
    "remainder.Scalar_Tensor remainder.Tensor rsqrt selu sigmoid sigmoid_backward silu silu_backward sinc sinh softplus softshrink "
    "tanh_backward maximum minimum clamp_min.Tensor clamp_max.Tensor special_entr special_i0e special_i1 special_i1e special_ndtri "
    "special_log_ndtr special_erfcx special_zeta special_xlog1py xlogy.Tensor"
).split()  # fmt: skip
POLYNOMIALS = [
    f"special_{kind}_polynomial_{letter}"
    for kind, letters in (
        ("chebyshev", "tuvw"), ("shifted_chebyshev", "tuvw"), ("hermite", ("h", "he")), ("laguerre", "l"), ("legendre", "p"),
    )
    for letter in letters
]  # fmt: skip


def _whole(name: str, unless: Any = None, **about: Any) -> None:
    """Replace an operator by itself on whole vectors."""
    op: Any = find_operator(name)

    def makes_no_float(*args: Any, **kwargs: Any) -> bool:
        """It makes integers of integers."""
        return _makes_no_float(op, *args, **kwargs)

    @Pointwise.replaces(name, unless=unless or makes_no_float, **{"targets": EAGER, **about})
    def function(*args: Any, **kwargs: Any) -> Tensor:
        tensors: list[Any] = []
        numbers: list[float] = []
        word: str | None = None
        for i, a in enumerate(op._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
            if "Tensor" in str(a.type):
                tensors.append(value)
            elif "str" in str(a.type):
                word = value
            elif isinstance(value, complex):
                refuse(
                    name,
                    [f"{a.name}={value}"],
                    "give it as a tensor, or compute the real and the imaginary part, each by itself",
                )
            elif value is not None:
                numbers.append(value)
        return ops.pointwise(name, _of_one_type(tensors), numbers, word)


def _of_one_type(values: list[Any]) -> list[Tensor]:
    """The operands in the type that PyTorch would compute in; a number, which the dispatcher hands on as one, as a tensor."""
    like = next(v for v in values if isinstance(v, Tensor))
    dtype = functools.reduce(torch.promote_types, (torch.result_type(like, v) for v in values))
    if not dtype.is_floating_point and not dtype.is_complex:  # a function of integers
        dtype = torch.get_default_dtype()
    if all(isinstance(v, Tensor) and v.dtype == dtype for v in values):
        return values
    return [v.to(dtype) if isinstance(v, Tensor) else like.new_full((), v, dtype=dtype) for v in values]


#: those that vary whatever their numbers are
WHOLE = [f"aten.{name}" if "." in name else f"aten.{name}.default" for name in VARY]
for _name in WHOLE:
    _whole(_name)
_whole("aten.pow.Tensor_Scalar", _square)
for _name in ("add.Tensor", "sub.Tensor", "rsub.Scalar"):
    _whole(f"aten.{_name}", _plain_sum)
# of complex numbers
for _name in ("angle.default", "neg.default", "sgn.default"):  # Inductor takes these apart
    _whole(f"aten.{_name}", _not_complex)
OF_COMPLEX: dict[str, Any] = {
    "targets": ["cpu", *EAGER],
    "why": "vector code multiplies complex numbers by the textbook, where scalar code sets infinities right; Inductor calls the same kernel",
    "source": "measured: a row of 10 complex64 with infinities; aten/src/ATen/cpu/vec/vec512/vec512_complex_float.h (operator*), torch 2.13",
}
for _name in ("mul.Tensor", "addcmul.default", "lerp.Scalar"):
    _whole(f"aten.{_name}", _not_complex, **OF_COMPLEX)
_whole("aten.pow.Tensor_Scalar", _not_complex, **{**OF_COMPLEX, "targets": ["cpu"]})

for _name in ("cos", "sin"):
    _whole(
        f"aten.{_name}.default",
        _not_float,
        targets=["cpu", *EAGER],
        why="eager code takes it from MKL and Inductor from SLEEF, so that a table of rotary angles made when the model is loaded differs "
        "from one made in its graph",
        source="measured: 177 of 3,200 cosines of positions, torch 2.13; aten/src/ATen/cpu/vml.h",
    )


def _of_16_bits(self: Any) -> bool:
    """PyTorch and Inductor compute it in float32 by SLEEF and round; or it is no tensor of floating-point numbers."""
    return not isinstance(self, Tensor) or self.dtype not in (torch.float32, torch.float64)


@Pointwise.replaces(
    "aten.tanh.default",
    unless=_of_16_bits,
    targets=EAGER,
    why="eager code takes it from MKL and Inductor from SLEEF, so that a soft-cap of logits in eager code differs from one in a graph",
    source="measured: 210 of 64,000 float32 logits capped at 30, torch 2.13; aten/src/ATen/cpu/vml.h",
)
def tanh(self: Tensor) -> Tensor:
    return ops.tanh(self)


def _polynomial(name: str) -> None:
    """Replace each overload by the operator on whole vectors, which is given no NaN."""

    def function(x: Any, n: Any) -> Tensor:
        x, n = _of_one_type([x, n])
        nan = x.isnan()
        return torch.where(nan, x, ops.pointwise(f"aten.{name}.default", [x.masked_fill(nan, 0), n]))

    for overload in ("default", "n_scalar", "x_scalar"):
        Pointwise.replaces(
            f"aten.{name}.{overload}",
            targets=["cpu", *EAGER],
            why="of NaN it gives what stands in memory, often the value of the element before; vector and scalar code round differently",
            source="aten/src/ATen/native/Math.h (T r, which is assigned in a loop that NaN does not enter), torch 2.13",
        )(function)


for _name in POLYNOMIALS:
    _polynomial(_name)


@Pointwise.replaces(aten.clamp.Tensor, unless=_not_float, targets=EAGER)
def clamp(self: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    low = self if min is None else ops.pointwise("aten.maximum.default", _of_one_type([self, min]))
    return low if max is None else ops.pointwise("aten.minimum.default", _of_one_type([low, max]))


@Pointwise.replaces(aten.lerp.Tensor, unless=_not_complex, **OF_COMPLEX)
def lerp(self: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return ops.pointwise("aten.mul.Tensor", [a, b])

    near = weight.real * weight.real + weight.imag * weight.imag < 0.25
    return torch.where(near, self + product(weight, end - self), end - product(end - self, 1 - weight))


@Pointwise.replaces(aten.glu.default, unless=_not_float, targets=EAGER)
def glu(self: Tensor, dim: int = -1) -> Tensor:
    return ops.pointwise("aten.glu.default", self.chunk(2, dim))


@Pointwise.replaces(
    aten.glu.default,
    targets=["cpu", "cuda"],
    why="Inductor lowers it as it is, and the audit knows no row of a half",
    source="torch/_inductor/lowering.py (glu), torch 2.13",
)
def glu_compiled(self: Tensor, dim: int = -1) -> Tensor:
    a, b = self.chunk(2, dim)
    if self.dtype in (torch.bfloat16, torch.float16):  # rounded once, as PyTorch's kernel does
        return (a.float() * b.float().sigmoid()).to(self.dtype)
    return a * b.sigmoid()
