"""Mixtures of experts: the gate, a few rows for each program, and the sum over a token's experts, a token for each.

For an NPU alone: on an H100 the gate's softmax had other bits than `bi_compile::softmax`. Elsewhere both are computed as they are
defined (`bi_compile.ops.moe`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from ..triton.launch import as_rows, cdiv, launch, row_stride
from ..triton.reduce import divide, exp, load_rows, program_rows, store_rows

#: elements of the tile of rows on which a gate's program works, and the greatest number of experts
GATE_ELEMENTS, MOST_EXPERTS = 512, 2048
#: columns that a program adds up of a token's experts
COMBINE_COLUMNS = 4096
#: below the key of every number
LOWEST = tl.constexpr(-(2**31))
#: the key of -inf
OF_MINUS_INFINITY = tl.constexpr(-2139095041)


@triton.jit
def _key(x, inside):
    """An integer for each number, in the numbers' order: NaN the largest, -0.0 as 0.0; LOWEST outside."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    return tl.where(inside, bits, LOWEST)


@triton.jit
def _first_largest(key, cols, BLOCK: tl.constexpr):
    """The place of each row's largest key, the lowest of equal ones."""
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], cols[None, :], BLOCK), 1)


@triton.jit
def _at(x, here):
    """Each row's one element where `here` is true."""
    return tl.sum(tl.where(here, x, 0.0), 1)


@triton.jit
def _of_best_groups(
    by, key, cols, K_GROUP: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TWO: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The keys of the experts in the K_GROUP best groups, that of -inf for the others; outside LOWEST, as it is."""
    group_cols = tl.arange(0, BLOCK_G)
    of_group = tl.zeros((BLOCK_R, BLOCK_G), tl.float32)
    for g in range(0, GROUPS):
        mine = tl.where(((cols >= g * SIZE) & (cols < g * SIZE + SIZE))[None, :], key, LOWEST)
        best = _first_largest(mine, cols, BLOCK_E)
        value = _at(by, cols[None, :] == best[:, None])
        if TWO:
            mine = tl.where(cols[None, :] == best[:, None], LOWEST, mine)
            second = _first_largest(mine, cols, BLOCK_E)
            value += _at(by, cols[None, :] == second[:, None])
        of_group = tl.where((group_cols == g)[None, :], value[:, None], of_group)
    group_key = _key(of_group, (group_cols < GROUPS)[None, :])
    left = tl.where((cols < GROUPS * SIZE)[None, :], tl.full((BLOCK_R, BLOCK_E), OF_MINUS_INFINITY, tl.int32), LOWEST)
    for _ in range(0, K_GROUP):
        best = _first_largest(group_key, group_cols, BLOCK_G)
        group_key = tl.where(group_cols[None, :] == best[:, None], LOWEST, group_key)
        first = best[:, None] * SIZE
        left = tl.where((cols[None, :] >= first) & (cols[None, :] < first + SIZE), key, left)
    return left


@triton.jit(do_not_specialize=["R"])
def _gate(
    x, bias, scores, weights, chosen, stride, R, E, scale, eps,
    K: tl.constexpr, K_GROUP: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TWO: tl.constexpr,
    SIGMOID: tl.constexpr, RENORM: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores of each row: softmax, its sum in `reduce._softmax`'s order, or sigmoid. Then K times the largest that is left; with
    RENORM their scores are added up in that order."""
    rows = program_rows(BLOCK_R)
    cols = tl.arange(0, BLOCK_E)
    value = load_rows(x, stride, rows, 0, R, E, float("-inf"), BLOCK_E, tl.float32)
    if SIGMOID:
        small = exp(-tl.abs(value))
        score = divide(tl.where(value >= 0.0, 1.0, small), small + 1.0)
    else:
        numerator = exp(value - tl.max(value, 1)[:, None])
        score = divide(numerator, tl.broadcast_to(tl.sum(numerator, 1)[:, None], BLOCK_R, BLOCK_E))
    store_rows(scores, score, rows, 0, R, E, BLOCK_E)
    by = score
    if BIASED:
        by += tl.load(bias + cols, mask=cols < E, other=0.0).to(tl.float32)[None, :]
    key = _key(by, (cols < E)[None, :])
    if K_GROUP < GROUPS:
        key = _of_best_groups(by, key, cols, K_GROUP, GROUPS, SIZE, TWO, BLOCK_R, BLOCK_E, BLOCK_G)

    places = tl.arange(0, BLOCK_K)
    weight = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    expert = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for i in range(0, K):
        best = _first_largest(key, cols, BLOCK_E)
        here = cols[None, :] == best[:, None]
        key = tl.where(here, LOWEST, key)
        its_score = _at(score, here)
        total += its_score
        weight = tl.where((places == i)[None, :], its_score[:, None], weight)
        expert = tl.where((places == i)[None, :], best[:, None], expert)
    if RENORM:
        weight = divide(weight, tl.broadcast_to((total + eps)[:, None], BLOCK_R, BLOCK_K))
    store_rows(weights, weight * scale, rows, 0, R, K, BLOCK_K)
    store_rows(chosen, expert, rows, 0, R, K, BLOCK_K)


@triton.jit
def _combine(x, rows, weights, out, stride, H, k, blocks, BLOCK_H: tl.constexpr):
    """Each token's k rows of x, times their weights, added up by fused multiply-adds in ascending order from 0."""
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for i in range(0, k):
        row = tl.abs(tl.load(rows + token * k + i)).to(tl.int64)
        weight = tl.load(weights + token * k + i).to(tl.float32)
        value = tl.load(x + row * stride + cols, mask=cols < H, other=0.0).to(tl.float32)
        total = tl.fma(value, tl.full((BLOCK_H,), 1.0, tl.float32) * weight, total)
    tl.store(out + token * H + cols, total.to(out.dtype.element_ty), mask=cols < H)


def moe_gate(
    x: Tensor,
    k: int,
    *,
    k_group: int = 1,
    groups: int = 1,
    two_of_group: bool = False,
    sigmoid: bool = False,
    renorm: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bi_compile.ops.moe_gate`; the order of the sums: `_gate`."""
    outs = ops.moe_gate.meta(
        x, k, k_group=k_group, groups=groups, two_of_group=two_of_group, sigmoid=sigmoid, renorm=renorm, scale=scale, eps=eps, bias=bias
    )  # fmt: skip
    if x.numel() == 0:
        return outs
    experts = x.shape[-1]
    width = triton.next_power_of_2(experts)
    if width > MOST_EXPERTS:
        raise NotImplementedError(
            f"bi_compile::moe_gate: a program holds a row of up to {MOST_EXPERTS} experts on {x.device}, not {experts}"
        )
    given, height = as_rows(x, experts), max(1, GATE_ELEMENTS // width)
    launch(
        _gate, cdiv(given.shape[0], height), given, given, None if bias is None else bias.contiguous(), *outs, row_stride(given),
        given.shape[0], experts, float(scale), float(eps), K=k, K_GROUP=k_group, GROUPS=groups, SIZE=experts // groups,
        TWO=two_of_group, SIGMOID=sigmoid, RENORM=renorm, BIASED=bias is not None, BLOCK_R=height, BLOCK_E=width,
        BLOCK_G=triton.next_power_of_2(groups), BLOCK_K=triton.next_power_of_2(k),
    )  # fmt: skip
    return outs


def moe_combine(x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """See `bi_compile.ops.moe_combine`; the order of the sum: `_combine`."""
    out = ops.moe_combine.meta(x, rows, weights)
    if out.numel() == 0:
        return out
    width = min(triton.next_power_of_2(x.shape[1]), COMBINE_COLUMNS)
    given, blocks = as_rows(x, x.shape[1]), cdiv(x.shape[1], width)
    launch(
        _combine, out.shape[0] * blocks, given, given, rows.contiguous(), weights.contiguous(), out, row_stride(given),
        x.shape[1], weights.shape[1], blocks, BLOCK_H=width,
    )  # fmt: skip
    return out


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"moe_gate": moe_gate, "moe_combine": moe_combine}
