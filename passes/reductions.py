"""Reductions: sum, mean, var, std, norms, logsumexp, cumsum."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass

aten = torch.ops.aten
Dims = Sequence[int] | None


def _exact(self: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> bool:
    """Integers add up the same in every order."""
    out = dtype or self.dtype
    return not (out.is_floating_point or out.is_complex)


def _dims(dim: int | Dims) -> list[int]:
    return [] if dim is None else [dim] if isinstance(dim, int) else list(dim)


def _float(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if x.is_floating_point() or x.is_complex() or dtype is None else x.to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Reductions(Pass):
    """Sums over a dimension, in one fixed order."""

    name = "reductions"
    why = "a reduction is cut into parts by the number of rows: few rows are reduced by many threads, many rows by one each"
    source = "aten/src/ATen/native/cuda/Reduce.cuh (block size from the output's size), TensorIteratorReduce.cpp (two_pass_reduction); vllm-ascend PR 6910"


@Reductions.replaces(aten.sum.default, unless=_exact)
def sum_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return ops.sum(_float(self, dtype), [], dtype=dtype)


@Reductions.replaces(aten.sum.dim_IntList, unless=_exact)
def sum_dim(self: Tensor, dim: Dims, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return ops.sum(_float(self, dtype), _dims(dim), keepdim, dtype=dtype)


@Reductions.replaces(aten.nansum.default, unless=_exact)
def nansum(self: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = _float(self, dtype)
    return ops.sum(torch.where(torch.isnan(x), 0.0, x), _dims(dim), keepdim, dtype=dtype)


@Reductions.replaces(aten.mean.default)
def mean_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return ops.mean(_float(self, dtype), [], dtype=dtype)


@Reductions.replaces(aten.mean.dim)
def mean_dim(self: Tensor, dim: Dims, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return ops.mean(_float(self, dtype), _dims(dim), keepdim, dtype=dtype)


@Reductions.replaces(aten.var_mean.correction)
def var_mean(
    self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return ops.var_mean(self, _dims(dim), 1 if correction is None else correction, keepdim)


@Reductions.replaces(aten.std_mean.correction)
def std_mean(
    self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    variance, mean = ops.var_mean(self, _dims(dim), 1 if correction is None else correction, keepdim)
    return variance.sqrt(), mean


@Reductions.replaces(aten.var.correction)
def var(self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return ops.var_mean(self, _dims(dim), 1 if correction is None else correction, keepdim)[0]


@Reductions.replaces(aten.std.correction)
def std(self: Tensor, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return ops.var_mean(self, _dims(dim), 1 if correction is None else correction, keepdim)[0].sqrt()


@Reductions.replaces(aten.linalg_vector_norm.default)
def vector_norm(
    self: Tensor, ord: float = 2, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    out = dtype or self.dtype
    x, dims = _wide(_float(self, dtype).to(out)), _dims(dim)
    if ord in (float("inf"), float("-inf")):
        limit = torch.amax if ord > 0 else torch.amin
        return limit(x.abs(), dims, keepdim).to(out)
    if ord == 0:
        return ops.sum((x != 0).to(x.dtype), dims, keepdim).to(out)
    if ord == 1:
        return ops.sum(x.abs(), dims, keepdim).to(out)
    if ord == 2:
        return ops.sum(x * x, dims, keepdim).sqrt().to(out)
    return ops.sum(x.abs() ** ord, dims, keepdim).pow(1.0 / ord).to(out)


@Reductions.replaces(aten.norm.ScalarOpt_dim)
def norm(self: Tensor, p: float | None, dim: Dims, keepdim: bool = False) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim)


@Reductions.replaces(aten.norm.ScalarOpt_dim_dtype)
def norm_dtype(self: Tensor, p: float | None, dim: Dims, keepdim: bool, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


@Reductions.replaces(aten.norm.Scalar)
def norm_all(self: Tensor, p: float = 2) -> Tensor:
    return vector_norm(self, p)


@Reductions.replaces(aten.logsumexp.default)
def logsumexp(self: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    return ops.logsumexp(_float(self, torch.get_default_dtype()), _dims(dim), keepdim)


@Reductions.replaces(
    aten.cumsum.default,
    unless=_exact,
    why="a scan is cut into parts by its length and the number of rows",
    source="aten/src/ATen/native/cuda/ScanUtils.cuh",
)
def cumsum(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return ops.cumsum(_float(self, dtype), dim, dtype=dtype)
