"""Sorts, selections and maxima where elements are equal: lowest index first, whatever the batch asks for."""

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass

aten = torch.ops.aten
Pair = tuple[Tensor, Tensor]
#: where Inductor takes the maximum and its index apart
COMPILED = ["cpu", "cuda"]
#: where the order of a maximum follows the threads
THREADS = ["cpu", "cpu_eager", "cuda"]
ZERO = "which of 0.0 and -0.0 is the maximum follows the order in which threads and vectors meet them"


class Ties(Pass):
    """topk, sort, kthvalue, median, mode and their indices, equal elements lowest index first; maxima without -0.0."""

    name = "ties"
    why = "which of several equal elements is taken, and in which order, follows k, the number of elements and the algorithm chosen by them"
    source = (
        "aten/src/ATen/native/cpu/SortingKernel.cpp (partial_sort or nth_element by k; x86-simd-sort, which is not stable); "
        "measured: 8 of 30 requests for logprobs in bfloat16 list other alternatives beside one that asks for more"
    )


def _is_stable(self: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> bool:
    return bool(stable)


@Ties.replaces(aten.sort.default)
def sort(self: Tensor, dim: int = -1, descending: bool = False) -> Pair:
    return aten.sort.stable(self, stable=True, dim=dim, descending=descending)


@Ties.replaces(aten.sort.stable, unless=_is_stable)
def sort_stable(self: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Pair:
    return aten.sort.stable(self, stable=True, dim=dim, descending=descending)


@Ties.replaces(aten.argsort.default)
def argsort(self: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return sort(self, dim, descending)[1]


@Ties.replaces(aten.argsort.stable)
def argsort_stable(self: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return sort(self, dim, descending)[1]


@Ties.replaces(aten.topk.default)
def topk(self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Pair:
    return ops.topk(self, k, dim, largest, sorted)


def _taken(values: Tensor, indices: Tensor, at: Tensor, dim: int, keepdim: bool) -> Pair:
    """Of each sorted row the element `at`, which has size 1 in `dim`."""
    taken = values.gather(dim, at), indices.gather(dim, at)
    return taken if keepdim else (taken[0].squeeze(dim), taken[1].squeeze(dim))


def _each(x: Tensor) -> Tensor:
    """A tensor without dimensions as a row of one."""
    return x.reshape(1) if x.dim() == 0 else x


@Ties.replaces(aten.kthvalue.default)
def kthvalue(self: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Pair:
    values, indices = sort(_each(self), dim)
    values, indices = values.narrow(dim, k - 1, 1), indices.narrow(dim, k - 1, 1)
    whole = keepdim and self.dim() > 0
    return (values, indices) if whole else (values.squeeze(dim), indices.squeeze(dim))


@Ties.replaces(aten.median.dim)
def median(self: Tensor, dim: int, keepdim: bool = False) -> Pair:
    """The lower of the two in the middle; the first NaN where there is one."""
    x = _each(self)
    values, indices = sort(x, dim)
    nans = x.isnan().sum(dim, keepdim=True)
    n = x.shape[dim]
    at = torch.where(nans > 0, n - nans, (n - 1) // 2)
    return _taken(values, indices, at, dim, keepdim and self.dim() > 0)


@Ties.replaces(aten.nanmedian.dim)
def nanmedian(self: Tensor, dim: int, keepdim: bool = False) -> Pair:
    """The lower of the two in the middle among those that are not NaN."""
    x = _each(self)
    values, indices = sort(x, dim)
    numbers = (~x.isnan()).sum(dim, keepdim=True)
    return _taken(values, indices, (numbers - 1).clamp(min=0) // 2, dim, keepdim and self.dim() > 0)


@Ties.replaces(aten.mode.default)
def mode(self: Tensor, dim: int = -1, keepdim: bool = False) -> Pair:
    """The most frequent, the smallest of several; the index is that of its last occurrence."""
    x = _each(self)
    values, indices = sort(x, dim)
    n = x.shape[dim]
    at = torch.arange(n, device=x.device).view([n if d == dim % x.dim() else 1 for d in range(x.dim())])
    begins = (values != values.roll(1, dim)) | (at == 0)
    run = at - torch.where(begins, at, 0).cummax(dim)[0]
    return _taken(values, indices, run.argmax(dim, keepdim=True), dim, keepdim and self.dim() > 0)


def _not_float(self: Tensor, *args: object, **kwargs: object) -> bool:
    return not self.is_floating_point()


@Ties.replaces(aten.amax.default, unless=_not_float, targets=THREADS, why=ZERO)
def amax(self: Tensor, dim: list[int] = [], keepdim: bool = False) -> Tensor:  # noqa: B006 - the operator's default
    return ops.amax(self, dim, keepdim)


@Ties.replaces(aten.amin.default, unless=_not_float, targets=THREADS, why=ZERO)
def amin(self: Tensor, dim: list[int] = [], keepdim: bool = False) -> Tensor:  # noqa: B006 - the operator's default
    return ops.amin(self, dim, keepdim)


@Ties.replaces(aten.aminmax.default, unless=_not_float, targets=THREADS, why=ZERO)
def aminmax(self: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Pair:
    dims = [] if dim is None else [dim]
    return ops.amin(self, dims, keepdim), ops.amax(self, dims, keepdim)


@Ties.replaces(aten.max.default, unless=_not_float, targets=THREADS, why=ZERO)
def max(self: Tensor) -> Tensor:
    return ops.amax(self, [])


@Ties.replaces(aten.min.default, unless=_not_float, targets=THREADS, why=ZERO)
def min(self: Tensor) -> Tensor:
    return ops.amin(self, [])


@Ties.replaces(aten.max.dim, unless=_not_float, targets=COMPILED, why=ZERO)
def max_dim(self: Tensor, dim: int, keepdim: bool = False) -> Pair:
    return _at(_each(self), _each(self).argmax(dim, keepdim=True), dim, keepdim and self.dim() > 0)


@Ties.replaces(aten.min.dim, unless=_not_float, targets=COMPILED, why=ZERO)
def min_dim(self: Tensor, dim: int, keepdim: bool = False) -> Pair:
    return _at(_each(self), _each(self).argmin(dim, keepdim=True), dim, keepdim and self.dim() > 0)


def _at(x: Tensor, at: Tensor, dim: int, keepdim: bool) -> Pair:
    """Of each row the element `at`, which has size 1 in `dim`, and where it stands."""
    value = x.gather(dim, at)
    return (value, at) if keepdim else (value.squeeze(dim), at.squeeze(dim))
