"""The largest and the smallest, where several are equal: by a rule that follows a row's own values and no batch.

Equal elements are taken lowest index first; -0.0 and 0.0 are equal, and so is any NaN to any other. NaN is the largest, as
in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Along, Reduces
from .declare import check, composite, operator
from .reduce import reduced_shape

_A = torch.ops.aten


@operator(
    "topk(Tensor x, SymInt k, int dim=-1, bool largest=True, bool sorted=True) -> (Tensor, Tensor)", batch=Along("dim")
)
def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (smallest) along `dim` and their int64 indices, in order, equal ones lowest index first.

    So the first elements for one k are those for any smaller k. `sorted=False` gives the same.
    """
    shape = list(x.shape)
    if shape:
        check(k <= shape[dim], lambda: f"k={k} elements of {shape[dim]} cannot be selected")
        shape[dim] = k
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@composite("topk")
def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    n = x.shape[dim]
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or n >= 1 << 31:
        values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
        return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()
    # value and index in one number, so that no two are equal: whatever finds the largest finds the same
    last = 0x7FFFFFFF
    bits = (x.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    order = torch.where(bits < 0, bits ^ last, bits).masked_fill_(x.isnan(), last)
    place = torch.arange(n - 1, -1, -1, device=x.device) if largest else torch.arange(n, device=x.device)
    shape = [1] * x.dim()
    shape[dim] = n
    best = _A.topk.default((order.long() << 32) + place.view(shape), k, dim, largest, True)[0] & 0xFFFFFFFF
    indices = n - 1 - best if largest else best
    return x.gather(dim, indices), indices


@operator("amax(Tensor x, int[] dim, bool keepdim=False) -> Tensor", batch=Reduces("dim"))
def amax(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """The maximum over `dim` (empty: all); a zero is 0.0, never -0.0, of whatever signs the zeros were."""
    return x.new_empty(reduced_shape(x, dim, keepdim))


@operator("amin(Tensor x, int[] dim, bool keepdim=False) -> Tensor", batch=Reduces("dim"))
def amin(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """The minimum over `dim` (empty: all); a zero is 0.0, never -0.0, of whatever signs the zeros were."""
    return x.new_empty(reduced_shape(x, dim, keepdim))


@composite("amax")
def _amax(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    return (_A.amax.default(x, dim, keepdim) + 0.0).to(x.dtype).contiguous()


@composite("amin")
def _amin(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    return (_A.amin.default(x, dim, keepdim) + 0.0).to(x.dtype).contiguous()
