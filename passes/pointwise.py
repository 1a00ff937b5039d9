"""Pointwise functions that a CPU computes differently by an element's place in memory."""

import math
from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, replaces

aten = torch.ops.aten
WHY = "vector and scalar code round differently, and which one computes an element follows the number of elements, strides and threads"
SOURCE = "measured: rows of 65 functions alone and among others, torch 2.13, AVX-512; aten/src/ATen/native/cpu/Loops.h (vectorized_loop)"
EAGER = ("cpu_eager",)
SMALL = "a tensor of one or two elements is computed by scalar code, which rounds differently"
SMALL_SOURCE = "measured under Inductor, torch 2.13: 30 functions of 1, 2, 3, 7 and 15 elements against 600"


def _not_float(*args: Any, **kwargs: Any) -> bool:
    return not any(isinstance(a, Tensor) and a.is_floating_point() for a in args)


def _plain_sum(self: Tensor, other: Any, *, alpha: float = 1) -> bool:
    return alpha == 1 or not isinstance(other, Tensor) or torch.result_type(self, other) not in (torch.bfloat16, torch.float16)


def _whole_vectors(self: Tensor, *args: Any) -> bool:
    """Inductor computes three or more elements in vector code, tails masked."""
    return _not_float(self, *args) or math.prod(n for n in self.shape if isinstance(n, int)) >= 4


ON_SMALL: Any = {"unless": _whole_vectors, "why": SMALL, "source": SMALL_SOURCE, "targets": ("cpu",)}


def _unary(targets: tuple[str, ...], unless: Any, why: str, source: str, packets: str) -> list[Any]:
    def one(name: str) -> Any:
        @replaces(name, unless=unless, why=why, source=source, targets=targets)
        def function(self: Tensor) -> Tensor:
            return ops.pointwise(name, [self])

        return function

    return [one(f"aten.{packet}.default") for packet in packets.split()]


def _binary(*names: str) -> list[Any]:
    def one(name: str) -> Any:
        @replaces(name, **ON_SMALL)
        @replaces(name, unless=_not_float, why=WHY, source=SOURCE, targets=EAGER)
        def function(self: Tensor, other: Tensor) -> Tensor:
            # the dispatcher hands a Python number on as one
            a, b = (x if isinstance(x, Tensor) else y.new_tensor(x) for x, y in ((self, other), (other, self)))
            return ops.pointwise(name, [a, b])

        return function

    return [one(name) for name in names]


class Pointwise(Pass):
    """Functions computed in vector code at every place."""

    name = "pointwise"

    unary = _unary(EAGER, _not_float, WHY, SOURCE, "atanh cosh exp2 mish rsqrt sigmoid silu sinh")
    binary = _binary("aten.pow.Tensor_Tensor", "aten.atan2.default", "aten.logaddexp.default", "aten.hypot.default")
    small = _unary(("cpu",), _whole_vectors, SMALL, SMALL_SOURCE, " ".join(n for n in ops.UNARY if n != "rsqrt"))

    @replaces(aten.gelu.default, unless=_not_float, why=WHY, source=SOURCE, targets=EAGER)
    def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
        return ops.pointwise("aten.gelu.default", [self], [], approximate)

    @replaces(aten.logit.default, unless=_not_float, why=WHY, source=SOURCE, targets=EAGER)
    def logit(self: Tensor, eps: float | None = None) -> Tensor:
        return ops.pointwise("aten.logit.default", [self], [] if eps is None else [eps])

    @replaces(aten.softplus.default, unless=_not_float, why=WHY, source=SOURCE, targets=EAGER)
    def softplus(self: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
        return ops.pointwise("aten.softplus.default", [self], [beta, threshold])

    @replaces(aten.elu.default, unless=_not_float, why=WHY, source=SOURCE, targets=EAGER)
    def elu(self: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
        return ops.pointwise("aten.elu.default", [self], [alpha, scale, input_scale])

    @replaces(aten.pow.Tensor_Scalar, **ON_SMALL)
    @replaces(aten.pow.Tensor_Scalar, unless=lambda self, exponent: _not_float(self) or exponent == 2, why=WHY, source=SOURCE, targets=EAGER)
    def pow_scalar(self: Tensor, exponent: float) -> Tensor:
        return ops.pointwise("aten.pow.Tensor_Scalar", [self], [exponent])

    @replaces(aten.pow.Scalar, **{**ON_SMALL, "unless": lambda self, exponent: _whole_vectors(exponent)})
    @replaces(aten.pow.Scalar, unless=_not_float, why=WHY, source=SOURCE, targets=EAGER)
    def scalar_pow(self: float, exponent: Tensor) -> Tensor:
        return ops.pointwise("aten.pow.Scalar", [exponent], [self])

    @replaces(aten.add.Tensor, unless=_plain_sum, why=WHY, source=SOURCE, targets=EAGER, eager=False)
    def add(self: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
        return ops.pointwise("aten.add.Tensor", [self, other], [alpha])

    @replaces(aten.sub.Tensor, unless=_plain_sum, why=WHY, source=SOURCE, targets=EAGER, eager=False)
    def sub(self: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
        return ops.pointwise("aten.sub.Tensor", [self, other], [alpha])

