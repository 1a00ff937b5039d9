"""Writes at indices. Where several go to one place, the last of them, in the order of the indices, is what stays.

How: each of them is first given the value of the last, so that it no longer matters which thread writes when. Which is the
last is found by sorting the places, stable. No sum is involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import BySize
from .declare import composite, operator

_A = torch.ops.aten
#: dtypes of an index that says which places are meant, one for each
MASKS = (torch.bool, torch.uint8)


def last_of_each(place: Tensor) -> Tensor:
    """For each write the number of the last one to its place. `place` [..., W], the writes along the last dimension: [..., W]."""
    if place.shape[-1] < 2:
        return torch.zeros_like(place, dtype=torch.int64)
    places, order = torch.sort(place, dim=-1, stable=True)
    return order.gather(-1, torch.searchsorted(places, place.contiguous(), right=True) - 1)


def _writes(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor
) -> tuple[list[Tensor | None], int, Tensor, Tensor]:
    """x[indices] = values as a list of writes: the indices, where their dimension stands in the result, the place of each
    write as a number, [W], and the values [..., W, ...]. A mask stands for the places where it is true."""
    found: list[Tensor | None] = []
    for i in indices:
        i = i if i is None else i.to(x.device)  # PyTorch takes those of the host too
        masks = i is not None and i.dtype in MASKS
        found += list(i.nonzero().unbind(1)) if masks and i is not None else [i]
    dims = [d for d, i in enumerate(found) if i is not None]
    given = torch.broadcast_tensors(*(i for i in found if i is not None))
    place = given[0].long() % x.shape[dims[0]]
    for d, i in zip(dims[1:], given[1:], strict=True):
        place = place * x.shape[d] + i % x.shape[d]
    together = given[0].shape  # of the indices, which stand where the first stood, in front if they are apart
    start = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    rest = [n for d, n in enumerate(x.shape) if d not in dims]
    whole = values.expand(*rest[:start], *together, *rest[start:])
    spread = whole.flatten(start, start + len(together) - 1) if together else whole.unsqueeze(start)
    flat = [None if i is None else next(each).reshape(-1) for each in [iter(given)] for i in found]
    return flat, start, place.reshape(-1), spread


def with_last_values(x: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> tuple[list[Tensor | None], Tensor]:
    """`indices` and `values` of x[indices] = values, each write with the value of the last to its place."""
    if values.numel() == 1:  # one value for all, which PyTorch takes from the host too
        return list(indices), values
    given = [i for i in indices if i is not None]
    if len(given) == 1 and given[0].dtype not in MASKS and given[0].numel() < 2:  # one place
        return list(indices), values
    found, start, place, spread = _writes(x, indices, values)
    return found, spread.index_select(start, last_of_each(place))


def add_in_order(x: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> None:
    """x[indices] += values in place, one write after another in the order of the indices, each sum rounded to x's dtype."""
    found, start, place, spread = _writes(x, indices, values.to(x.device))
    places, order = torch.sort(place, stable=True)
    nth = torch.arange(len(place), device=x.device) - torch.searchsorted(places, places)
    for n in range(int(nth.max()) + 1 if len(place) else 0):
        now = order[nth == n]  # the n-th write to each place: no two go to one
        at = [None if i is None else i[now] for i in found]
        _A._index_put_impl_.default(x, at, _A.index.Tensor(x, at) + spread.index_select(start, now), False, False)


@operator("index_put(Tensor x, Tensor?[] indices, Tensor values) -> Tensor", batch=BySize())
def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    """x with x[indices] = values; the last of several writes to one place stays. Contiguous."""
    return x.new_empty(x.shape)


@composite("index_put")
def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    found, last = with_last_values(x, indices, values)
    return _A._index_put_impl_.default(out, found, last, False, False)


@operator("index_copy(Tensor x, int dim, Tensor index, Tensor source) -> Tensor", batch=BySize())
def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """x with the slices of `source` along `dim` at `index`; the last of several to one place stays. Contiguous."""
    return x.new_empty(x.shape)


@composite("index_copy")
def _index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    return _A.index_copy_.default(out, dim, index, with_last_slices(dim, index, source))


def with_last_slices(dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`source` of index_copy, each slice that of the last to its place."""
    return source.index_select(dim, last_of_each(index.reshape(-1))) if source.dim() else source


@operator("scatter(Tensor x, int dim, Tensor index, Tensor src) -> Tensor", batch=BySize())
def scatter(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`torch.scatter`; of several writes to one place the last along `dim` stays. Contiguous."""
    return x.new_empty(x.shape)


@composite("scatter")
def _scatter(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if index.dim() == 0 or index.numel() == 0:
        return _A.scatter_.src(out, dim, index, src)
    written = src[tuple(slice(n) for n in index.shape)]
    last = last_of_each(index.movedim(dim, -1)).movedim(-1, dim)
    return _A.scatter_.src(out, dim, index, written.gather(dim, last))
