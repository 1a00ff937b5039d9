"""AscendC operators of the package `batch_invariant_ops`, which take precedence over the Triton kernels where it is installed.

Where an argument goes beyond what theirs takes (a dtype, several dimensions), the Triton kernel stays.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import HostError

#: what theirs takes: half precisions and float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: AscendC operators of the package `batch_invariant_ops`, by the operator of ours that each serves
ASCENDC = {
    "mm": "npu_mm_batch_invariant",
    "sum": "npu_reduce_sum_batch_invariant",
    "mean": "npu_reduce_mean_batch_invariant",
    "log_softmax": "npu_log_softmax_batch_invariant",
}


def ascendc_operators() -> dict[str, Callable[..., object]]:
    """`ASCENDC`, looked up; empty where the package is not installed.

    Raises:
        HostError: the package is there and lacks one of them.
    """
    if importlib.util.find_spec("batch_invariant_ops") is None:
        return {}
    import batch_invariant_ops  # noqa: F401  registers torch.ops.batch_invariant_ops

    missing = [name for name in ASCENDC.values() if not hasattr(torch.ops.batch_invariant_ops, name)]
    if missing:
        raise HostError(
            f"the package batch_invariant_ops lacks {', '.join(missing)}: install its current release (for Ascend 950: 2.0.0 or "
            "newer), or uninstall it to use the Triton kernels"
        )
    return {ours: getattr(torch.ops.batch_invariant_ops, theirs) for ours, theirs in ASCENDC.items()}


def _mm(theirs: Callable[..., Any], ours: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    return theirs(a, b) if a.dtype in DTYPES and a.numel() and b.numel() else ours(a, b)


def _reduce(
    theirs: Callable[..., Any],
    ours: Callable[..., Any],
    x: Tensor,
    dim: list[int],
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    fits = len(dim) == 1 and dtype in (None, x.dtype) and x.dtype in DTYPES and x.numel()
    return theirs(x, dim, keepdim) if fits else ours(x, dim, keepdim, dtype=dtype)


def _log_softmax(
    theirs: Callable[..., Any], ours: Callable[..., Any], x: Tensor, dim: int, *, dtype: Any = None
) -> Tensor:
    fits = dtype in (None, x.dtype) and x.dtype in DTYPES and x.numel()
    return theirs(x, dim=dim).contiguous() if fits else ours(x, dim, dtype=dtype)


_CALLS: dict[str, Callable[..., Any]] = {"mm": _mm, "sum": _reduce, "mean": _reduce, "log_softmax": _log_softmax}


def preferred(kernels: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """`kernels`, those that AscendC has replaced by it; the same ones where the package is not installed.

    Raises:
        HostError: the package is there and lacks an operator that is needed.
    """
    theirs = ascendc_operators()
    return kernels | {name: functools.partial(_CALLS[name], op, kernels[name]) for name, op in theirs.items()}
