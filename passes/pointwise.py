"""Pointwise functions that a CPU computes differently by an element's place in memory."""

from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass

aten = torch.ops.aten
#: eager code on a CPU
EAGER = ["cpu_eager"]


def _not_float(*args: Any, **kwargs: Any) -> bool:
    return not any(isinstance(a, Tensor) and a.is_floating_point() for a in args)


def _square(self: Any, exponent: Any) -> bool:
    """Whether the power is a product of the tensor with itself, or no floating-point function at all."""
    return exponent == 2 or _not_float(self)


def _plain_sum(self: Tensor, other: Any, *, alpha: float = 1) -> bool:
    return (
        alpha == 1
        or not isinstance(other, Tensor)
        or torch.result_type(self, other) not in (torch.bfloat16, torch.float16)
    )


class Pointwise(Pass):
    """Functions computed in vector code at every place."""

    name = "pointwise"
    why = "vector and scalar code round differently, and which one computes an element follows the number of elements, strides and threads"
    source = "measured: rows of 65 functions alone and among others, torch 2.13, AVX-512; aten/src/ATen/native/cpu/Loops.h (vectorized_loop)"


def _unary(name: str) -> None:
    @Pointwise.replaces(name, unless=_not_float, targets=EAGER)
    def function(self: Tensor) -> Tensor:
        return ops.pointwise(name, [self])


def _binary(name: str) -> None:
    @Pointwise.replaces(name, unless=_not_float, targets=EAGER)
    def function(self: Tensor, other: Tensor) -> Tensor:
        # the dispatcher hands a Python number on as one
        a, b = (x if isinstance(x, Tensor) else y.new_tensor(x) for x, y in ((self, other), (other, self)))
        return ops.pointwise(name, [a, b])


for _name in "atanh cosh exp2 mish rsqrt sigmoid silu sinh".split():
    _unary(f"aten.{_name}.default")
for _name in "pow.Tensor_Tensor atan2.default logaddexp.default hypot.default".split():
    _binary(f"aten.{_name}")


@Pointwise.replaces(aten.gelu.default, unless=_not_float, targets=EAGER)
def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    return ops.pointwise("aten.gelu.default", [self], [], approximate)


@Pointwise.replaces(aten.logit.default, unless=_not_float, targets=EAGER)
def logit(self: Tensor, eps: float | None = None) -> Tensor:
    return ops.pointwise("aten.logit.default", [self], [] if eps is None else [eps])


@Pointwise.replaces(aten.softplus.default, unless=_not_float, targets=EAGER)
def softplus(self: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return ops.pointwise("aten.softplus.default", [self], [beta, threshold])


@Pointwise.replaces(aten.elu.default, unless=_not_float, targets=EAGER)
def elu(self: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return ops.pointwise("aten.elu.default", [self], [alpha, scale, input_scale])


@Pointwise.replaces(aten.celu.default, unless=_not_float, targets=EAGER)
def celu(self: Tensor, alpha: float = 1.0) -> Tensor:
    return ops.pointwise("aten.elu.default", [self], [alpha, 1.0, 1.0 / alpha])


@Pointwise.replaces(aten.pow.Tensor_Scalar, unless=_square, targets=EAGER)
def pow_scalar(self: Tensor, exponent: float) -> Tensor:
    return ops.pointwise("aten.pow.Tensor_Scalar", [self], [exponent])


@Pointwise.replaces(aten.pow.Scalar, unless=_not_float, targets=EAGER)
def scalar_pow(self: float, exponent: Tensor) -> Tensor:
    return ops.pointwise("aten.pow.Scalar", [exponent], [self])


@Pointwise.replaces(aten.add.Tensor, unless=_plain_sum, targets=EAGER, eager=False)
def add(self: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    return ops.pointwise("aten.add.Tensor", [self, other], [alpha])


@Pointwise.replaces(aten.sub.Tensor, unless=_plain_sum, targets=EAGER, eager=False)
def sub(self: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    return ops.pointwise("aten.sub.Tensor", [self, other], [alpha])
