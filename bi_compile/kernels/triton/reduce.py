"""Reductions over rows of C contiguous elements.

Every row sum has one order, a function of C and the dtype: lane j of BLOCK_C adds up the columns j, j + BLOCK_C, ...
in ascending order in its accumulator, then one `tl.sum` adds up the lanes. A program holds whole rows; no sum runs across them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from .launch import accumulator, as_rows, cdiv, launch, row_stride, rows_meta, target
from .tiles import SCAN_ROWS, SCAN_WARPS


@triton.jit
def exp(x):
    """e**x for x <= 0, infinite or NaN. In float32 correct to about one unit in the last place at any x.

    The hardware's exponential is 2**(x * log2(e)), and the rounding error of that product grows with x. So the integer part
    of the exponent is split off first, exactly.
    """
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        bounded = tl.where(x < -150.0, -150.0, x)  # not tl.maximum, which may drop a NaN
        bounded = tl.where(bounded > 150.0, 150.0, bounded)
        exponent = tl.floor(tl.fma(bounded, 1.4426950408889634, 0.5))
        rest = tl.fma(exponent, -0.693359375, bounded)  # the two constants add up to -log(2); the first has few digits
        rest = tl.fma(exponent, 2.12194440e-4, rest)
        result = tl.exp(rest) * tl.exp2(exponent)
    return result


@triton.jit
def _numerator(x, NARROW: tl.constexpr):
    """e**x; with NARROW 2 by the hardware's exponential, whose error, up to 5e-6 of e**-87, does not show in 16 bits."""
    if NARROW == 2:
        result = tl.exp2(x * 1.4426950408889634)
    else:
        result = exp(x)
    return result


@triton.jit
def divide(x, y):
    """x / y, correctly rounded: the hardware's float32 division is not."""
    if x.dtype == tl.float64:
        result = x / y
    else:
        result = tl.div_rn(x, y)
    return result


@triton.jit
def fold(x):
    """Sum of x [A, B, C] over B, a power of two: its halves added, then the halves of that sum, and so on.

    The order is the same however the elements are spread over threads; that of `tl.sum` is not.
    """
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2])), 1)
    return tl.reshape(x, (x.shape[0], x.shape[2]))


@triton.jit
def program_rows(BLOCK_R: tl.constexpr):
    """The rows that this program computes."""
    return tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def load_rows(x, stride, rows, start, R, C, other, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """The columns from `start` of the rows, in ACC; `other` outside."""
    cols = start + tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    return tl.load(x + rows[:, None] * stride + cols[None, :], mask=inside, other=other).to(ACC)


@triton.jit
def store_rows(out, value, rows, start, R, C, BLOCK_C: tl.constexpr):
    """Write the columns from `start` of the rows of `out`, which is contiguous, rounded to its dtype."""
    cols = start + tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    tl.store(out + rows[:, None] * C + cols[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_each(out, value, rows, R):
    """Write one value for each row, rounded to out's dtype."""
    tl.store(out + rows, value.to(out.dtype.element_ty), mask=rows < R)


@triton.jit
def row_sum(
    x, stride, rows, R, C, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """Sum of each row. WHOLE: a row fits into BLOCK_C. Its columns are then no loop, in which NVIDIA's compiler has one load wait for another."""
    lanes = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        lanes += load_rows(x, stride, rows, start, R, C, 0.0, BLOCK_C, ACC)
    return tl.sum(lanes, 1)


@triton.jit
def row_mean(
    x, stride, rows, R, C, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    return divide(row_sum(x, stride, rows, R, C, WHOLE, BLOCK_R, BLOCK_C, ACC), tl.full((BLOCK_R,), C, ACC))


@triton.jit
def row_var(
    x, stride, rows, mean, R, C, divisor,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of the squared distances of each row to its mean, over `divisor`."""
    lanes = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        distance = load_rows(x, stride, rows, start, R, C, 0.0, BLOCK_C, ACC) - mean[:, None]
        distance = tl.where((start + tl.arange(0, BLOCK_C) < C)[None, :], distance, 0.0)
        lanes = tl.fma(distance, distance, lanes)
    return divide(tl.sum(lanes, 1), divisor)


@triton.jit
def _row_max(
    x, stride, rows, R, C, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """Maximum of each row. NaN is ignored here; it reaches the result through the sum of the exponentials."""
    lanes = tl.full((BLOCK_R, BLOCK_C), float("-inf"), ACC)
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        lanes = tl.maximum(lanes, load_rows(x, stride, rows, start, R, C, float("-inf"), BLOCK_C, ACC))
    return tl.max(lanes, 1)


@triton.jit
def _row_sum_exp(
    x, stride, rows, row_max, R, C,
    NARROW: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of exp(x - row_max) of each row."""
    lanes = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        value = load_rows(x, stride, rows, start, R, C, float("-inf"), BLOCK_C, ACC) - row_max[:, None]
        lanes += _numerator(value, NARROW)
    return tl.sum(lanes, 1)


@triton.jit(do_not_specialize=["R"])
def _sum(
    x, out, stride, R, C,
    MEAN: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of each row, over C if MEAN. Lanes ascending, then one `tl.sum`."""
    rows = program_rows(BLOCK_R)
    if MEAN:
        value = row_mean(x, stride, rows, R, C, WHOLE, BLOCK_R, BLOCK_C, ACC)
    else:
        value = row_sum(x, stride, rows, R, C, WHOLE, BLOCK_R, BLOCK_C, ACC)
    store_each(out, value, rows, R)


@triton.jit(do_not_specialize=["R"])
def _var_mean(
    x, var, mean, stride, R, C,
    CORRECTION: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean of each row, then the squared distances to it over max(C - CORRECTION, 0): two sums in `_sum`'s order."""
    rows = program_rows(BLOCK_R)
    center = row_mean(x, stride, rows, R, C, WHOLE, BLOCK_R, BLOCK_C, ACC)
    divisor = tl.full((BLOCK_R,), C, ACC) - tl.full((BLOCK_R,), CORRECTION, ACC)
    divisor = tl.where(divisor > 0, divisor, 0.0)
    store_each(var, row_var(x, stride, rows, center, R, C, divisor, WHOLE, BLOCK_R, BLOCK_C, ACC), rows, R)
    store_each(mean, center, rows, R)


@triton.jit(do_not_specialize=["R"])
def _logsumexp(
    x, out, stride, R, C,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """row_max + log(sum(exp(x - row_max))) of each row, the sum in `_sum`'s order; an infinite row_max counts as 0."""
    rows = program_rows(BLOCK_R)
    row_max = _row_max(x, stride, rows, R, C, WHOLE, BLOCK_R, BLOCK_C, ACC)
    row_max = tl.where(tl.abs(row_max) == float("inf"), 0.0, row_max)
    total = _row_sum_exp(x, stride, rows, row_max, R, C, 0, WHOLE, BLOCK_R, BLOCK_C, ACC)
    store_each(out, tl.log(total) + row_max, rows, R)


@triton.jit(do_not_specialize=["R"])
def _softmax(
    x, out, stride, R, C,
    LOG: tl.constexpr, NARROW: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """exp(x - row_max) / sum, or (x - row_max) - log(sum), of each row; the sum of exp(x - row_max) in `_sum`'s order.

    WHOLE: a row fits into BLOCK_C and is read once. NARROW: 1 where `out` has 16 bits, 2 where the exponential may know it (`_numerator`).
    """
    rows = program_rows(BLOCK_R)
    if WHOLE:
        value = load_rows(x, stride, rows, 0, R, C, float("-inf"), BLOCK_C, ACC)
        value = value - tl.max(value, 1)[:, None]
        numerator = _numerator(value, NARROW)
        _store_softmax(out, value, numerator, tl.sum(numerator, 1), rows, 0, R, C, LOG, NARROW, BLOCK_R, BLOCK_C)
    else:
        row_max = _row_max(x, stride, rows, R, C, WHOLE, BLOCK_R, BLOCK_C, ACC)
        total = _row_sum_exp(x, stride, rows, row_max, R, C, NARROW, WHOLE, BLOCK_R, BLOCK_C, ACC)
        for start in range(0, C, BLOCK_C):
            value = load_rows(x, stride, rows, start, R, C, float("-inf"), BLOCK_C, ACC) - row_max[:, None]
            _store_softmax(
                out, value, _numerator(value, NARROW), total, rows, start, R, C, LOG, NARROW, BLOCK_R, BLOCK_C
            )


@triton.jit
def _store_softmax(
    out, value, numerator, total, rows, start, R, C,
    LOG: tl.constexpr, NARROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if LOG:
        value = value - tl.log(total)[:, None]
    elif NARROW > 0:
        # the result is rounded to 16 bits, so the reciprocal's error in the last digit of float32 does not show
        value = numerator * divide(tl.full((BLOCK_R,), 1.0, tl.float32), total)[:, None]
    else:
        value = divide(numerator, tl.broadcast_to(total[:, None], BLOCK_R, BLOCK_C))
    store_rows(out, value, rows, start, R, C, BLOCK_C)


@triton.jit(do_not_specialize=["R"])
def _cumsum(x, out, stride_r, stride_c, R, C, BLOCK_R: tl.constexpr, ACC: tl.constexpr):
    """On Ascend: running sum of each row, one element after the other in ascending order; one lane for each row."""
    rows = program_rows(BLOCK_R)
    x_ptrs = x + rows * stride_r
    out_ptrs = out + rows * C
    total = tl.zeros((BLOCK_R,), ACC)
    for _ in range(C):
        total += tl.load(x_ptrs, mask=rows < R, other=0.0).to(ACC)
        tl.store(out_ptrs, total.to(out.dtype.element_ty), mask=rows < R)
        x_ptrs += stride_c
        out_ptrs += 1


@triton.jit(do_not_specialize=["R"])
def _cumsum_in_blocks(
    x, out, stride, R, C, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """Running sum of each row: `tl.cumsum` of each block of BLOCK_C columns, to which the result before the block is added."""
    rows = program_rows(BLOCK_R)
    last = tl.arange(0, BLOCK_C) == BLOCK_C - 1
    before = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        value = tl.cumsum(load_rows(x, stride, rows, start, R, C, 0.0, BLOCK_C, ACC), 1) + before[:, None]
        store_rows(out, value, rows, start, R, C, BLOCK_C)
        before = tl.sum(tl.where(last[None, :], value, 0.0), 1)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x cast to `dtype` where that loses digits; the kernels read a narrower x as it is."""
    exact = x.dtype == dtype or dtype == torch.float64 or (dtype == torch.float32 and x.dtype != torch.float64)
    return x if exact else x.to(dtype)


def _rows(x: Tensor, dim: Sequence[int]) -> Tensor:
    """x as [R, C]: C runs over `dim` (empty: all) in row-major order, R over the rest. Copies unless `dim` is last."""
    if x.dim() == 0:
        return x.view(1, 1)
    reduced = sorted({d % x.dim() for d in dim} or range(x.dim()))
    kept = [d for d in range(x.dim()) if d not in reduced]
    return as_rows(x.permute(*kept, *reduced), math.prod(x.shape[d] for d in reduced))


def _launch_rows(
    kernel: Any, rows: Tensor, outs: Sequence[Tensor], acc: torch.dtype, most_warps: int = 32, **meta: Any
) -> None:
    count, length = rows.shape
    meta |= rows_meta(rows, length) | {"ACC": accumulator(acc)}
    meta["num_warps"] = min(meta["num_warps"], most_warps)
    launch(kernel, cdiv(count, meta["BLOCK_R"]), rows, rows, *outs, row_stride(rows), count, length, **meta)


def _reduce(kernel: Any, x: Tensor, dim: Sequence[int], outs: Sequence[Tensor], empty: float, **meta: Any) -> None:
    """Fill `outs` with the kernel's result over `dim`; with `empty` where C is 0."""
    if x.numel() == 0:
        for out in outs:
            out.fill_(empty)
        return
    _launch_rows(kernel, _rows(_cast(x, outs[0].dtype), dim), outs, outs[0].dtype, **meta)


def sum(x: Tensor, dim: Sequence[int], keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """See `bi_compile.ops.sum`; the order of the sum: `_sum`."""
    out = ops.sum.meta(x, dim, keepdim, dtype=dtype)
    _reduce(_sum, x, dim, [out], 0.0, MEAN=False)
    return out


def mean(x: Tensor, dim: Sequence[int], keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """See `bi_compile.ops.mean`; the order of the sum: `_sum`."""
    out = ops.mean.meta(x, dim, keepdim, dtype=dtype)
    _reduce(_sum, x, dim, [out], float("nan"), MEAN=True)
    return out


def var_mean(x: Tensor, dim: Sequence[int], correction: float = 1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.var_mean`; the order of the sums: `_var_mean`."""
    var, mean = ops.var_mean.meta(x, dim, correction, keepdim)
    _reduce(_var_mean, x, dim, [var, mean], float("nan"), CORRECTION=float(correction))
    return var, mean


def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """See `bi_compile.ops.logsumexp`; the order of the sum: `_logsumexp`."""
    out = ops.logsumexp.meta(x, dim, keepdim)
    _reduce(_logsumexp, x, dim, [out], float("-inf"))
    return out


def _along(x: Tensor, dim: int, out: Tensor, fill: Callable[[Tensor, Tensor], None]) -> Tensor:
    """`out`, of x's size and contiguous, after `fill(rows, out_rows)` with `dim` as the last of both."""
    if x.numel() == 0:
        return out
    if x.dim() == 0:
        fill(x.view(1, 1), out.view(1, 1))
        return out
    rows = x.movedim(dim, -1)
    filled = out if dim % x.dim() == x.dim() - 1 else out.new_empty(rows.shape)
    fill(rows.reshape(-1, rows.shape[-1]), filled.view(-1, rows.shape[-1]))
    return out if filled is out else out.copy_(filled.movedim(-1, dim))


def _fill_softmax(log: bool) -> Callable[[Tensor, Tensor], None]:
    def fill(x: Tensor, out: Tensor) -> None:
        length = x.shape[1]
        x = as_rows(_cast(x, out.dtype), length)
        narrow = 0 if log or out.element_size() != 2 else 1 if target(x) == "npu" else 2
        _launch_rows(_softmax, x, [out], out.dtype, LOG=log, NARROW=narrow)

    return fill


def _fill_cumsum(x: Tensor, out: Tensor) -> None:
    x = _cast(x, out.dtype)
    if target(x) != "npu":
        _launch_rows(_cumsum_in_blocks, as_rows(x, x.shape[1]), [out], out.dtype, SCAN_WARPS)
        return
    launch(
        _cumsum, cdiv(x.shape[0], SCAN_ROWS), x, x, out, *x.stride(), *x.shape,
        BLOCK_R=SCAN_ROWS, ACC=accumulator(out.dtype), num_warps=1,
    )  # fmt: skip


def softmax(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """See `bi_compile.ops.softmax`; the order of the sum: `_softmax`."""
    return _along(x, dim, ops.softmax.meta(x, dim, dtype=dtype), _fill_softmax(log=False))


def log_softmax(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """See `bi_compile.ops.log_softmax`; the order of the sum: `_softmax`."""
    return _along(x, dim, ops.log_softmax.meta(x, dim, dtype=dtype), _fill_softmax(log=True))


def cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """See `bi_compile.ops.cumsum`; the order of the sum: `_cumsum_in_blocks`, on Ascend `_cumsum`."""
    return _along(x, dim, ops.cumsum.meta(x, dim, dtype=dtype), _fill_cumsum)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "sum": sum,
    "mean": mean,
    "var_mean": var_mean,
    "logsumexp": logsumexp,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "cumsum": cumsum,
}
