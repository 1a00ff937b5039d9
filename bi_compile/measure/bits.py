"""Tensors compared as bits: NaN equals NaN of the same payload, and 0 differs from -0."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(x: Tensor) -> Tensor:
    """The same memory as signed integers; a complex number as two."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg()
    return x.contiguous().view(_INTEGERS[x.element_size()])


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two tensors of one dtype and shape differ."""

    elements: int
    """How many elements differ in any bit, of `of`."""
    of: int
    ulps: int | None
    """Largest distance in units of the last place (for integers: the largest difference); None: a NaN is among them."""
    absolute: float | None
    """Largest difference of two elements that are numbers (a ULP says little near zero: a change of sign is two billion of
    them); infinite where one is infinite; None: a NaN is among them."""
    index: tuple[int, ...]
    """The element that is furthest apart, or the first that differs by NaN; for complex numbers 0 or 1 follows."""
    alone: str
    together: str

    def __str__(self) -> str:
        far = "NaN on one side, or of another payload"
        if self.ulps is not None:
            far = f"at most {self.ulps} ULP, {self.absolute:.3g} in value"
        at = "" if not self.index else f" at {list(self.index)}"
        return f"{self.elements} of {self.of} elements, {far}{at}: {self.alone} alone, {self.together} together"


def difference(alone: Tensor, together: Tensor) -> Difference | None:
    """None where the two are equal bit for bit.

    Raises:
        ValueError: they have another dtype or shape.
    """
    if alone.dtype != together.dtype or alone.shape != together.shape:
        raise ValueError(
            f"{alone.dtype}{list(alone.shape)} cannot be compared with {together.dtype}{list(together.shape)}"
        )
    a, b = as_bits(alone), as_bits(together)
    unequal = a != b
    if not unequal.any():
        return None
    x, y = (torch.view_as_real(t) if t.is_complex() else t for t in (alone, together))
    nan = unequal & (x.isnan() | y.isnan()) if x.is_floating_point() else torch.zeros_like(unequal)
    if nan.any():
        where, ulps, absolute = nan, None, None
    else:
        # in double the order of distances may be lost in its last place, not which elements differ
        order_a, order_b = (_ordered(t, x.is_floating_point()) for t in (a, b))
        distance = (order_a.double() - order_b.double()).abs().masked_fill(~unequal, -1)
        where = distance == distance.max()
        at = tuple(where.nonzero()[0].tolist())
        ulps = abs(int(order_a[at]) - int(order_b[at]))
        absolute = float((x[unequal].double() - y[unequal].double()).abs().max())
    index = tuple(where.nonzero()[0].tolist())
    return Difference(int(unequal.sum()), a.numel(), ulps, absolute, index, _show(x[index]), _show(y[index]))


def _ordered(bits: Tensor, floating: bool) -> Tensor:
    """Integers in the order of the numbers, neighbours one apart; -0 and 0 are the same."""
    wide = bits.long()
    if not floating:
        return wide
    return torch.where(wide < 0, -(wide & (2 ** (8 * bits.element_size() - 1) - 1)), wide)


def _show(x: Tensor) -> str:
    return repr(x.item()) if not x.isnan() else f"nan ({int(as_bits(x)) & (2 ** (8 * x.element_size()) - 1):#x})"
