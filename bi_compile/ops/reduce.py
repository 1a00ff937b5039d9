"""Reductions. The reduced dimensions are read in row-major order as one sequence of length C.

The order of the sum is a function of C, the dtype and the device; `bi_compile.kernels` states it. Where a dtype is
narrower than float32 the sum is taken in float32 or wider and rounded once. Outputs are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Along, Reduces
from .declare import check, operator
from .matmul import FLOATS


def _float(name: str, x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    for t in (x.dtype, dtype or x.dtype):
        check(
            t in FLOATS,
            lambda: f"bi_compile::{name} has no kernel for {t}: use float32, bfloat16, float16 or float64",
        )
    return dtype or x.dtype


def reduced_shape(x: Tensor, dim: Sequence[int], keepdim: bool) -> list[int]:
    """The size of `x` after reducing `dim` (empty: every dimension)."""
    dims = {d % x.dim() if x.dim() else 0 for d in dim} or set(range(x.dim()))
    check(len(dim) in (0, len(dims)), lambda: f"a dimension appears twice in {list(dim)}")
    return [1 if i in dims else n for i, n in enumerate(x.shape) if keepdim or i not in dims]


@operator("sum(Tensor x, int[] dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor", batch=Reduces("dim"))
def sum(x: Tensor, dim: Sequence[int], keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over `dim` (empty: all). `dtype`: x is read, cast to it, summed, and returned in it. C == 0 gives 0."""
    return x.new_empty(reduced_shape(x, dim, keepdim), dtype=_float("sum", x, dtype))


@operator("mean(Tensor x, int[] dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor", batch=Reduces("dim"))
def mean(x: Tensor, dim: Sequence[int], keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """`sum` divided by C in the accumulator, rounded once. C == 0 gives NaN."""
    return x.new_empty(reduced_shape(x, dim, keepdim), dtype=_float("mean", x, dtype))


@operator(
    "var_mean(Tensor x, int[] dim, Scalar correction=1, bool keepdim=False) -> (Tensor, Tensor)", batch=Reduces("dim")
)
def var_mean(x: Tensor, dim: Sequence[int], correction: float = 1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Variance and mean over `dim` (empty: all), in two passes: the mean, then the mean of squared distances to it.

    The divisor is max(C - correction, 0); a divisor of 0 gives NaN (no distance) or inf, as in `torch.var_mean`.
    """
    _float("var_mean", x)
    shape = reduced_shape(x, dim, keepdim)
    return x.new_empty(shape), x.new_empty(shape)


@operator("logsumexp(Tensor x, int[] dim, bool keepdim=False) -> Tensor", batch=Reduces("dim"))
def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """log(sum(exp(x))) over `dim`, the maximum taken out first (an infinite one left in). C == 0 gives -inf."""
    _float("logsumexp", x)
    return x.new_empty(reduced_shape(x, dim, keepdim))


@operator("softmax(Tensor x, int dim, *, ScalarType? dtype=None) -> Tensor", batch=Along("dim"))
def softmax(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x - max) / sum(exp(x - max)) along `dim`, computed in float32 or wider; result contiguous in `dtype` or x's."""
    return x.new_empty(x.shape, dtype=_float("softmax", x, dtype))


@operator("log_softmax(Tensor x, int dim, *, ScalarType? dtype=None) -> Tensor", batch=Along("dim"))
def log_softmax(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """(x - max) - log(sum(exp(x - max))) along `dim`, computed in float32 or wider; result contiguous in `dtype` or x's."""
    return x.new_empty(x.shape, dtype=_float("log_softmax", x, dtype))


@operator("cumsum(Tensor x, int dim, *, ScalarType? dtype=None) -> Tensor", batch=Along("dim"))
def cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Running sum along `dim`, accumulated in float32 or wider, each result rounded once. The order of the sums depends on the length of `dim`,
    the dtype and the device; on a CPU and on Ascend they are taken element after element."""
    return x.new_empty(x.shape, dtype=_float("cumsum", x, dtype))
