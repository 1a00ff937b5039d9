"""Normalisations. Every sum over a row has the order of `reduce._sum`, a function of C and the dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from .launch import ALIGNMENT, aligned, as_head_rows, as_rows, cdiv, launch, row_stride, rows_meta, target
from .reduce import divide, load_rows, program_rows, row_mean, row_var, store_each, store_rows


@triton.jit
def _summand(
    x, stride_xg, stride_xr, residual, stride_residual, rows, start, R, C,
    GROUP: tl.constexpr, ADD: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The columns from `start` of x, or of x + residual rounded to x's dtype, in ACC.

    Row r of x is row r % GROUP of group r // GROUP: stride_xr between rows of a group, stride_xg between groups.
    """
    if GROUP == 1:
        value = load_rows(x, stride_xg, rows, start, R, C, 0.0, BLOCK_C, ACC)
    else:
        cols = start + tl.arange(0, BLOCK_C)
        first = (rows // GROUP) * stride_xg + (rows % GROUP) * stride_xr
        inside = (rows < R)[:, None] & (cols < C)[None, :]
        value = tl.load(x + first[:, None] + cols[None, :], mask=inside, other=0.0).to(ACC)
    if ADD:
        value += load_rows(residual, stride_residual, rows, start, R, C, 0.0, BLOCK_C, ACC)
        value = value.to(x.dtype.element_ty).to(ACC)
    return value


@triton.jit
def _param(param, rows, start, C, groups, rest, GROUPED: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """The weight or bias for the columns from `start`: one for each column, or if GROUPED one for each channel.

    A row of group_norm is one group: C // rest channels of `rest` elements each; `groups` consecutive rows are one sample.
    """
    cols = start + tl.arange(0, BLOCK_C)
    if GROUPED:
        channel = (rows % groups)[:, None] * (C // rest) + (cols // rest)[None, :]
        value = tl.load(param + channel, mask=(cols < C)[None, :], other=0.0).to(ACC)
    else:
        value = tl.load(param + cols, mask=cols < C, other=0.0).to(ACC)[None, :]
    return value


@triton.jit(do_not_specialize=["R"])
def _rms_norm(
    x, residual, weight, y, rstd, s, stride_xg, stride_xr, stride_residual, R, C,
    GROUP: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, WHOLE: tl.constexpr,
    ROUND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s = x + residual if ADD (else x); y = s / sqrt(sum(s * s) / C + EPS) * weight. The sum has the order of `_sum`.

    s is computed again for y instead of being read back: another thread may have written it. WHOLE: a row fits into BLOCK_C and is read
    once, and the weight is on its way while the sum is taken. ROUND: s / sqrt(...) is rounded to x's dtype before a weight of 16 bits
    multiplies it.
    """
    rows = program_rows(BLOCK_R)
    lanes = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    value = lanes
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        value = _summand(
            x, stride_xg, stride_xr, residual, stride_residual, rows, start, R, C, GROUP, ADD, BLOCK_C, ACC
        )
        lanes = tl.fma(value, value, lanes)
        if ADD:
            store_rows(s, value, rows, start, R, C, BLOCK_C)
    if WHOLE and WEIGHT:
        factor = _param(weight, rows, 0, C, 0, 1, False, BLOCK_C, ACC)
    square = divide(tl.sum(lanes, 1), tl.full((BLOCK_R,), C, ACC))
    scale = tl.rsqrt(square + tl.full((BLOCK_R,), EPS, ACC))
    store_each(rstd, scale, rows, R)
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        if not WHOLE:
            value = _summand(
                x, stride_xg, stride_xr, residual, stride_residual, rows, start, R, C, GROUP, ADD, BLOCK_C, ACC
            )
            if WEIGHT:
                factor = _param(weight, rows, start, C, 0, 1, False, BLOCK_C, ACC)
        scaled = value * scale[:, None]
        if WEIGHT:
            if ROUND and weight.dtype.element_ty.primitive_bitwidth == 16:
                scaled = scaled.to(x.dtype.element_ty).to(ACC)
            scaled = scaled * factor
        store_rows(y, scaled, rows, start, R, C, BLOCK_C)


@triton.jit(do_not_specialize=["R"])
def _qk_norm(
    x, q_weight, k_weight, q, k, stride, R, C,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, EPS: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_rms_norm` of the first Q_HEADS + K_HEADS heads of each token, of C elements each, which fit into BLOCK_C."""
    rows = program_rows(BLOCK_R)
    token = rows // (Q_HEADS + K_HEADS)
    head = rows % (Q_HEADS + K_HEADS)
    cols = tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    value = tl.load(x + (token * stride + head * C)[:, None] + cols[None, :], mask=inside, other=0.0).to(ACC)
    lanes = tl.fma(value, value, tl.zeros((BLOCK_R, BLOCK_C), ACC))
    q_factor = _param(q_weight, rows, 0, C, 0, 1, False, BLOCK_C, ACC)
    k_factor = _param(k_weight, rows, 0, C, 0, 1, False, BLOCK_C, ACC)
    square = divide(tl.sum(lanes, 1), tl.full((BLOCK_R,), C, ACC))
    scaled = value * tl.rsqrt(square + tl.full((BLOCK_R,), EPS, ACC))[:, None]
    if ROUND and q_weight.dtype.element_ty.primitive_bitwidth == 16:
        scaled = scaled.to(x.dtype.element_ty).to(ACC)
    of_q = (head < Q_HEADS)[:, None]
    scaled = (scaled * tl.where(of_q, q_factor, k_factor)).to(x.dtype.element_ty)
    tl.store(q + (token * Q_HEADS + head)[:, None] * C + cols[None, :], scaled, mask=inside & of_q)
    tl.store(k + (token * K_HEADS + head - Q_HEADS)[:, None] * C + cols[None, :], scaled, mask=inside & (of_q == 0))


@triton.jit(do_not_specialize=["R"])
def _layer_norm(
    x, weight, bias, y, mean, rstd, stride, R, C, groups, rest,
    EPS: tl.constexpr, GROUPED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * rstd * weight + bias: the mean, then the squared distances to it, two sums in `_sum`'s order."""
    rows = program_rows(BLOCK_R)
    center = row_mean(x, stride, rows, R, C, WHOLE, BLOCK_R, BLOCK_C, ACC)
    count = tl.full((BLOCK_R,), C, ACC)
    var = row_var(x, stride, rows, center, R, C, count, WHOLE, BLOCK_R, BLOCK_C, ACC)
    scale = tl.rsqrt(var + tl.full((BLOCK_R,), EPS, ACC))
    store_each(mean, center, rows, R)
    store_each(rstd, scale, rows, R)
    for start in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        value = load_rows(x, stride, rows, start, R, C, 0.0, BLOCK_C, ACC) - center[:, None]
        value = value * scale[:, None]
        if WEIGHT:
            factor = _param(weight, rows, start, C, groups, rest, GROUPED, BLOCK_C, ACC)
        else:
            factor = tl.full((1, BLOCK_C), 1.0, ACC)
        if BIAS:
            addend = _param(bias, rows, start, C, groups, rest, GROUPED, BLOCK_C, ACC)
        else:
            addend = tl.zeros((1, BLOCK_C), ACC)
        store_rows(y, tl.fma(value, factor, addend), rows, start, R, C, BLOCK_C)


def _param_or_none(p: Tensor | None) -> Tensor | None:
    return None if p is None else aligned(p.contiguous())


def _run_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, y: Tensor, rstd: Tensor, s: Tensor | None
) -> None:
    if x.numel() == 0:
        rstd.fill_(float("nan"))
        return
    length = x.shape[-1]
    rows, group, *strides = as_head_rows(x, length)
    others = None if residual is None else as_rows(residual, length)
    meta = rows_meta(rows, length)
    count = rstd.numel()
    launch(
        _rms_norm, cdiv(count, meta["BLOCK_R"]), x, rows, others, _param_or_none(weight), y, rstd, s,
        *strides, 0 if others is None else row_stride(others), count, length,
        GROUP=group, EPS=eps, ADD=others is not None, WEIGHT=weight is not None,
        ROUND=target(x) != "npu", **meta,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.rms_norm`; the order of the sum: `_rms_norm`."""
    y, rstd = ops.rms_norm.meta(x, weight, eps)
    _run_rms_norm(x, None, weight, eps, y, rstd, None)
    return y, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `bi_compile.ops.add_rms_norm`; one kernel; the order of the sum: `_rms_norm`."""
    y, rstd, s = ops.add_rms_norm.meta(x, residual, weight, eps)
    _run_rms_norm(x, residual, weight, eps, y, rstd, s)
    return y, rstd, s


def qk_norm(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, q_heads: int, k_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.qk_norm`; the order of the sum: `_rms_norm`."""
    outs = ops.qk_norm.meta(qkv, q_weight, k_weight, q_heads, k_heads, eps)
    length, count = q_weight.shape[0], qkv.shape[0] * (q_heads + k_heads)
    if count == 0 or length == 0:
        return outs
    x = as_rows(qkv, qkv.shape[1])
    meta = rows_meta(x, length)
    # other rows are read by other threads, in another order than a norm's alone
    even = length % ALIGNMENT == 0 and row_stride(x) % ALIGNMENT == 0
    if not meta.pop("WHOLE") or not even:
        q, k = qkv[:, : (q_heads + k_heads) * length].unflatten(1, (-1, length)).split([q_heads, k_heads], 1)
        return rms_norm(q, q_weight, eps)[0], rms_norm(k, k_weight, eps)[0]
    launch(
        _qk_norm, cdiv(count, meta["BLOCK_R"]), qkv, x, _param_or_none(q_weight), _param_or_none(k_weight), *outs, row_stride(x), count, length,
        Q_HEADS=q_heads, K_HEADS=k_heads, EPS=eps, ROUND=target(qkv) != "npu", **meta,
    )  # fmt: skip
    return outs


def _run_layer_norm(
    x: Tensor, length: int, weight: Tensor | None, bias: Tensor | None, eps: float, outs: tuple[Tensor, Tensor, Tensor],
    groups: int = 0, rest: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`outs` (y, mean, rstd) filled for rows of `length` elements; groups = 0: a weight for each of them."""
    if x.numel() == 0:
        outs[1].fill_(float("nan"))
        outs[2].fill_(float("nan"))
        return outs
    rows = as_rows(x, length)
    meta = rows_meta(rows, length)
    launch(
        _layer_norm, cdiv(rows.shape[0], meta["BLOCK_R"]), x, rows, _param_or_none(weight), _param_or_none(bias),
        *outs, row_stride(rows), rows.shape[0], length, groups, rest,
        EPS=eps, GROUPED=groups > 0, WEIGHT=weight is not None, BIAS=bias is not None, **meta,
    )  # fmt: skip
    return outs


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `bi_compile.ops.layer_norm`; the order of the sums: `_layer_norm`."""
    outs = ops.layer_norm.meta(x, weight, bias, eps)
    return _run_layer_norm(x, x.shape[-1], weight, bias, eps, outs)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bi_compile.ops.group_norm`; the order of the sums: `_layer_norm`."""
    outs = ops.group_norm.meta(x, weight, bias, groups, eps)
    rest = x[0, 0].numel() if x.numel() else 1
    return _run_layer_norm(x, x.shape[1] // groups * rest, weight, bias, eps, outs, groups, rest)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "qk_norm": qk_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
}
