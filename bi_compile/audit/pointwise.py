"""Operators by name, and which of them are pointwise: each element of the result is made of one element of each operand."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from ..ops import NAMESPACE

#: operators of Inductor that PyTorch has not had since 2.10, the oldest release that is supported: name -> the first that has it
SINCE = {"prims.inductor_cvt_e8m0_rceil.default": "2.11"}


def aten(packets: str) -> frozenset[str]:
    """Every overload of each aten operator named. Raises AttributeError: PyTorch has no operator of that name."""
    found = (getattr(torch.ops.aten, name) for name in packets.split())
    return frozenset(str(getattr(packet, overload)) for packet in found for overload in packet.overloads())


def default(namespace: str, packets: str) -> frozenset[str]:
    """The default overload of each operator named. Raises AttributeError: there is none of that name."""
    of = getattr(torch.ops, namespace)
    return frozenset(str(getattr(of, name).default) for name in packets.split())


def inductor(packets: str) -> frozenset[str]:
    """Primitives that are there once Inductor is imported, which takes a second: tests/audit/test_spec.py looks them up."""
    return frozenset(f"prims.{name}.default" for name in packets.split())


#: pointwise, though PyTorch does not tag them so
POINTWISE = (
    aten("floor_divide masked_fill masked_fill_ where")
    | default(
        "prims",
        "abs acos acosh add asin asinh atan atan2 atanh bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 bitwise_and "
        "bitwise_not bitwise_or bitwise_xor cbrt ceil cos cosh digamma div eq erf erf_inv erfc erfcx exp exp2 expm1 floor fmax fmin "
        "fmod frexp gcd ge gt hypot igamma igammac isfinite le lgamma log log10 log1p log2 lt maximum minimum mul ndtri ne neg "
        "nextafter pow reciprocal remainder round rsqrt shift_left shift_right_arithmetic sign signbit sin sinh "
        "spherical_bessel_j0 sqrt sub tan tanh trunc where zeta",
    )
    | inductor("fma inductor_cvt_e8m0_rceil")
    | default(NAMESPACE, "pointwise")
)


def is_pointwise(operator: Any) -> bool:
    """Whether `operator` is an overload that PyTorch tags pointwise, or one of `POINTWISE`."""
    return isinstance(operator, OpOverload) and (torch.Tag.pointwise in operator.tags or str(operator) in POINTWISE)
