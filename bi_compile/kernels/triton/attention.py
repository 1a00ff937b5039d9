"""Attention: one program for each tile of queries, which walks the keys in ascending order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from .reduce import divide, exp, fold
from .tiles import (
    ATTENTION,
    ATTENTION_HEAD,
    LONGEST_HEAD,
    Tile,
    accumulator,
    cdiv,
    choose,
    fitting,
    folds,
    launch,
    target,
)


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b. In float64, which `tl.dot` does not take everywhere, the sum of the broadcast products."""
    if a.dtype == tl.float64:
        result = acc + fold(a[:, :, None] * b[None, :, :])
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def _weight(x, HALF: tl.constexpr):
    """e**x; by the hardware's exponential where the result is rounded to 16 bits anyway."""
    if HALF:
        result = tl.exp(x)
    else:
        result = exp(x)
    return result


@triton.jit(do_not_specialize=["L", "S", "tiles"])
def _attention(
    q, k, v, mask, out, lse, tiles, heads, group, L, S, D, DV,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, v_batch, v_head, v_row, v_col,
    mask_batch, mask_head, mask_row, mask_col,
    SCALE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys in blocks of BLOCK_N, ascending, with a running maximum, sum and output in float32.

    The sum of the weights: lane j of BLOCK_N adds up the keys j, j + BLOCK_N, ... ascending, then `fold`, or `tl.sum`
    if not FOLD. The output: one dot after the other. In float64 a dot is a `fold` of the products.

    Row r of a key head's queries is query r // group of its head r % group. A block none of whose keys a row sees
    leaves the row's numbers as they are, so it does not matter whether it is skipped, as causal blocks behind the
    tile's last query are. MASK: 0 none, 1 bool, 2 float.
    """
    place = (tl.program_id(0) // tiles).to(tl.int64)
    batch = place // heads
    head = place % heads
    first = tl.program_id(0) % tiles * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    query = (rows // group).to(tl.int64)
    q_heads = head * group + rows % group
    valid = query < L
    ds = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    keys = tl.arange(0, BLOCK_N).to(tl.int64)

    q_tile = q + batch * q_batch + q_heads[:, None] * q_head + query[:, None] * q_row + ds[None, :] * q_col
    q_block = tl.load(q_tile, mask=valid[:, None] & (ds < D)[None, :], other=0.0)
    k_tile = k + batch * k_batch + head * k_head + keys[None, :] * k_row + ds[:, None] * k_col
    v_tile = v + batch * v_batch + head * v_head + keys[:, None] * v_row + dvs[None, :] * v_col
    if MASK:
        mask_tile = mask + batch * mask_batch + q_heads[:, None] * mask_head + query[:, None] * mask_row
        mask_tile += keys[None, :] * mask_col

    peak = tl.full((BLOCK_M,), float("-inf"), ACC)
    lanes = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    end = S
    if CAUSAL:
        end = tl.minimum(S, (first + BLOCK_M - 1) // group + 1)
    for start in range(0, end, BLOCK_N):
        k_block = tl.load(k_tile, mask=(keys < S - start)[None, :] & (ds < D)[:, None], other=0.0)
        scores = _dot(q_block, k_block, tl.zeros((BLOCK_M, BLOCK_N), ACC))
        scale = tl.full((BLOCK_M, BLOCK_N), SCALE, ACC)
        seen = valid[:, None] & (keys < S - start)[None, :]
        if CAUSAL:
            seen = seen & (start + keys[None, :] <= query[:, None])
        if MASK == 1:
            seen = seen & (tl.load(mask_tile, mask=seen, other=0) != 0)
        if MASK == 2:
            addend = tl.load(mask_tile, mask=seen, other=float("-inf")).to(ACC)
            seen = seen & (addend != float("-inf"))
            scores = tl.fma(scores, scale, addend)
        else:
            scores = scores * scale
        scores = tl.where(seen, scores, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = _weight(scores - base[:, None], HALF)
        shrink = _weight(peak - base, HALF)
        v_block = tl.load(v_tile, mask=(keys < S - start)[:, None] & (dvs < DV)[None, :], other=0.0)
        new_lanes = tl.fma(lanes, tl.broadcast_to(shrink[:, None], BLOCK_M, BLOCK_N), weights)
        new_acc = _dot(weights.to(v.dtype.element_ty), v_block, acc * shrink[:, None])
        if CAUSAL or MASK:
            # 0 * NaN is NaN: a block of which a row sees nothing must not bring it a NaN of v
            any_seen = tl.max(seen.to(tl.int32), 1) > 0
            lanes = tl.where(any_seen[:, None], new_lanes, lanes)
            acc = tl.where(any_seen[:, None], new_acc, acc)
        else:
            lanes = new_lanes
            acc = new_acc
        peak = new_peak
        k_tile += BLOCK_N * k_row
        v_tile += BLOCK_N * v_row
        if MASK:
            mask_tile += BLOCK_N * mask_col

    if FOLD:
        total = tl.reshape(fold(lanes[:, :, None]), (BLOCK_M,))
    else:
        total = tl.sum(lanes, 1)
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = divide(acc, tl.broadcast_to(total[:, None], BLOCK_M, BLOCK_DV))
    row = (batch * heads * group + q_heads) * L + query
    tl.store(lse + row, tl.where(nothing, float("-inf"), peak + tl.log(total)), mask=valid)
    sink = out + row[:, None] * DV + dvs[None, :]
    tl.store(sink, acc.to(out.dtype.element_ty), mask=valid[:, None] & (dvs < DV)[None, :])


def _mask(mask: Tensor | None, shape: list[int]) -> tuple[int, Tensor | None, tuple[int, ...]]:
    """Kind of the mask for the kernel, the mask as bytes or floats, its strides over [B, Hq, L, S]."""
    if mask is None:
        return 0, None, (0, 0, 0, 0)
    kind = 1 if mask.dtype == torch.bool else 2
    mask = (mask.view(torch.uint8) if kind == 1 else mask).expand(shape)
    return kind, mask, mask.stride()


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    outs: tuple[Tensor, Tensor], tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `outs` (output, logsumexp), both contiguous; any strides of the others; `tile`: not the table's."""
    batches, q_heads, length, dim = query.shape
    heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    if outs[1].numel() == 0:
        return outs
    kind, mask, mask_strides = _mask(mask, [batches, q_heads, length, keys])
    group = q_heads // heads
    device, size = target(query), query.element_size()
    shortest, longest = ATTENTION_HEAD[device]
    blocks = [max(shortest, triton.next_power_of_2(n)) for n in (dim, value_dim)]
    limit = LONGEST_HEAD.get(device, {}).get(size)
    if limit is not None and max(blocks) > limit:
        raise NotImplementedError(
            f"bi_compile::scaled_dot_product_attention: heads of {max(dim, value_dim)} in {query.dtype} do not fit into an "
            f"Ascend NPU's on-chip memory, which holds {limit}: use a shorter head or a narrower dtype"
        )
    tile = fitting(tile or choose(ATTENTION[device][size], length * group), max(blocks), longest)
    tiles = cdiv(length * group, tile.height)
    launch(
        _attention, batches * heads * tiles, query, query, key, value, mask, *outs,
        tiles, heads, group, length, keys, dim, value_dim,
        *query.stride(), *key.stride(), *value.stride(), *mask_strides,
        SCALE=1 / math.sqrt(dim) if scale is None and dim else float(scale or 0), MASK=kind, CAUSAL=causal,
        HALF=size == 2, ACC=accumulator(query.dtype), FOLD=folds(query), BLOCK_M=tile.height, BLOCK_N=tile.width,
        BLOCK_D=blocks[0], BLOCK_DV=blocks[1],
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return outs


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.scaled_dot_product_attention`; the order of the sums: `_attention`."""
    outs = ops.scaled_dot_product_attention.__wrapped__(query, key, value, attn_mask, is_causal, scale=scale)
    return attention(query, key, value, attn_mask, is_causal, scale, outs)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": scaled_dot_product_attention}
