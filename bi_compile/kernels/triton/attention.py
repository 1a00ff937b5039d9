"""Attention: one program for each tile of queries, which takes the keys in ascending order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from .launch import accumulator, cdiv, choose, launch, target
from .reduce import divide, exp, fold
from .tiles import ATTENTION, ATTENTION_HEAD, LONGEST_HEAD, Tile


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b. In float64, which `tl.dot` does not take everywhere, the sum of the broadcast products."""
    if a.dtype == tl.float64:
        result = acc + fold(a[:, :, None] * b[None, :, :])
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def _exp(x, HALF: tl.constexpr):
    """e**x; the hardware's exponential where the result is rounded to 16 bits anyway."""
    if HALF:
        result = tl.exp(x)
    else:
        result = exp(x)
    return result


@triton.jit(do_not_specialize=["L", "S", "num_pid_m"])
def _attention(
    q, k, v, mask, out, lse, num_pid_m, heads, group, L, S, D, DV,
    stride_qz, stride_qh, stride_qm, stride_qd, stride_kz, stride_kh, stride_kn, stride_kd,
    stride_vz, stride_vh, stride_vn, stride_vd, stride_maskz, stride_maskh, stride_maskm, stride_maskn,
    SCALE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
    FOLD: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys in blocks of BLOCK_N, ascending, with running maximum m_i, sum l_i and output acc in float32.

    The sum of exp(qk - m_i): lane j of BLOCK_N adds up the keys j, j + BLOCK_N, ... ascending, then `fold`, or `tl.sum`
    if not FOLD. The output: one dot after the other. In float64 a dot is a `fold` of the products.

    Row r of a key head's queries is query r // group of its head r % group. A block none of whose keys a row sees
    leaves the row's numbers as they are, so it does not matter whether it is skipped, as causal blocks behind the
    tile's last query are. MASK: 0 none, 1 bool, 2 float. GROUP: `group`, where the output is stored by queries and heads; 0: by rows.
    """
    off_zh = (tl.program_id(0) // num_pid_m).to(tl.int64)
    off_z = off_zh // heads
    off_h = off_zh % heads
    m0 = tl.program_id(0) % num_pid_m * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    position = offs_m // group
    query = position.to(tl.int64)
    q_head = off_h * group + offs_m % group
    valid = position < L
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    # masks in 32 bits: Ascend's vector unit does not compare 64, and its compiler then takes one element after the other
    offs_key = tl.arange(0, BLOCK_N)
    offs_n = offs_key.to(tl.int64)

    q_ptrs = (
        q + off_z * stride_qz + q_head[:, None] * stride_qh + query[:, None] * stride_qm + offs_d[None, :] * stride_qd
    )
    q_block = tl.load(q_ptrs, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
    k_ptrs = k + off_z * stride_kz + off_h * stride_kh + offs_n[None, :] * stride_kn + offs_d[:, None] * stride_kd
    v_ptrs = v + off_z * stride_vz + off_h * stride_vh + offs_n[:, None] * stride_vn + offs_dv[None, :] * stride_vd
    if MASK:
        mask_ptrs = mask + off_z * stride_maskz + q_head[:, None] * stride_maskh + query[:, None] * stride_maskm
        mask_ptrs += offs_n[None, :] * stride_maskn

    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    end = S
    if CAUSAL:
        end = tl.minimum(S, (m0 + BLOCK_M - 1) // group + 1)
    for start_n in range(0, end, BLOCK_N):
        k_block = tl.load(k_ptrs, mask=(offs_key < S - start_n)[None, :] & (offs_d < D)[:, None], other=0.0)
        qk = _dot(q_block, k_block, tl.zeros((BLOCK_M, BLOCK_N), ACC))
        scale = tl.full((BLOCK_M, BLOCK_N), SCALE, ACC)
        seen = valid[:, None] & (offs_key < S - start_n)[None, :]
        if CAUSAL:
            seen = seen & (start_n + offs_key[None, :] <= position[:, None])
        if MASK == 1:
            seen = seen & (tl.load(mask_ptrs, mask=seen, other=0) != 0)
        if MASK == 2:
            addend = tl.load(mask_ptrs, mask=seen, other=float("-inf")).to(ACC)
            seen = seen & (addend != float("-inf"))
            qk = tl.fma(qk, scale, addend)
        else:
            qk = qk * scale
        qk = tl.where(seen, qk, float("-inf"))

        m_ij = tl.maximum(m_i, tl.max(qk, 1))
        shift = tl.where(m_ij == float("-inf"), 0.0, m_ij)
        p = _exp(qk - shift[:, None], HALF)
        alpha = _exp(m_i - shift, HALF)
        v_block = tl.load(v_ptrs, mask=(offs_key < S - start_n)[:, None] & (offs_dv < DV)[None, :], other=0.0)
        new_l_i = tl.fma(l_i, tl.broadcast_to(alpha[:, None], BLOCK_M, BLOCK_N), p)
        new_acc = _dot(p.to(v.dtype.element_ty), v_block, acc * alpha[:, None])
        if CAUSAL or MASK:
            # 0 * NaN is NaN: a NaN in v must not reach a row that sees no key of the block
            any_seen = tl.max(seen.to(tl.int32), 1) > 0
            l_i = tl.where(any_seen[:, None], new_l_i, l_i)
            acc = tl.where(any_seen[:, None], new_acc, acc)
        else:
            l_i = new_l_i
            acc = new_acc
        m_i = m_ij
        k_ptrs += BLOCK_N * stride_kn
        v_ptrs += BLOCK_N * stride_vn
        if MASK:
            mask_ptrs += BLOCK_N * stride_maskn

    if FOLD:
        total = tl.reshape(fold(l_i[:, :, None]), (BLOCK_M,))
    else:
        total = tl.sum(l_i, 1)
    no_key = total == 0.0
    total = tl.where(no_key, 1.0, total)
    acc = divide(acc, tl.broadcast_to(total[:, None], BLOCK_M, BLOCK_DV))
    row = (off_z * heads * group + q_head) * L + query
    tl.store(lse + row, tl.where(no_key, float("-inf"), m_i + tl.log(total)), mask=valid)
    if GROUP > 0:
        # what a division of rows hides from Ascend's compiler, which then stores single elements
        HEADS: tl.constexpr = GROUP if GROUP < BLOCK_M else BLOCK_M
        QUERIES: tl.constexpr = BLOCK_M // HEADS
        ahead = tl.arange(0, QUERIES)
        heads_ahead = tl.arange(0, HEADS)
        first = m0 // GROUP
        out_base = out + (((off_z * heads + off_h) * GROUP + m0 % GROUP) * L + first) * DV
        out_ptrs = (
            out_base
            + (ahead.to(tl.int64) * DV)[:, None, None]
            + (heads_ahead.to(tl.int64) * L * DV)[None, :, None]
            + offs_dv[None, None, :]
        )
        there = (
            (ahead < L - first)[:, None, None] & (heads_ahead < GROUP)[None, :, None] & (offs_dv < DV)[None, None, :]
        )
        tl.store(out_ptrs, tl.reshape(acc.to(out.dtype.element_ty), (QUERIES, HEADS, BLOCK_DV)), mask=there)
    else:
        out_ptrs = out + row[:, None] * DV + offs_dv[None, :]
        tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=valid[:, None] & (offs_dv < DV)[None, :])


def _uses_fold(x: Tensor) -> bool:
    """Whether the lanes' sum is `reduce.fold`. Not on Ascend, where one tile, so one compiled order, serves all rows and
    the many small dimensions of `fold` overflow the unified buffer."""
    return target(x) != "npu"


def blocks_of_head(operator: str, query: Tensor, dim: int, value_dim: int) -> list[int]:
    """What heads of `dim` and `value_dim` elements are padded to.

    Raises:
        NotImplementedError: the device's on-chip memory has no room for them.
    """
    blocks = [max(ATTENTION_HEAD[target(query)][0], triton.next_power_of_2(n)) for n in (dim, value_dim)]
    limit = LONGEST_HEAD.get(target(query), {}).get(query.element_size())
    if limit is not None and max(blocks) > limit:
        raise NotImplementedError(
            f"bi_compile::{operator}: heads of {max(dim, value_dim)} in {query.dtype} do not fit into an "
            f"Ascend NPU's on-chip memory, which holds {limit}: use a shorter head or a narrower dtype"
        )
    return blocks


def _fit_to_head(tile: Tile, head: int, longest: int) -> Tile:
    """`tile`, with fewer rows and stages where heads of `head` elements, more than `longest`, would overflow memory."""
    height = tile.height if head <= longest else min(tile.height, 16)
    warps = max(1, tile.warps * height // tile.height)
    return Tile(height, tile.width, warps, max(1, min(tile.stages, 512 // head)))


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
    """Fill `outs` (output, logsumexp), both contiguous; the others may have any strides. `tile`: in place of the table's."""
    batches, q_heads, length, dim = query.shape
    heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    if outs[1].numel() == 0:
        return outs
    kind, mask, mask_strides = _mask(mask, [batches, q_heads, length, keys])
    group = q_heads // heads
    device, size = target(query), query.element_size()
    blocks, longest = blocks_of_head("scaled_dot_product_attention", query, dim, value_dim), ATTENTION_HEAD[device][1]
    tile = _fit_to_head(tile or choose(ATTENTION[device][size], length * group), max(blocks), longest)
    num_pid_m = cdiv(length * group, tile.height)
    # an Ascend 950 has no room for the longest heads' output twice
    by_heads = device == "npu" and group & (group - 1) == 0 and blocks[1] < 512
    launch(
        _attention, batches * heads * num_pid_m, query, query, key, value, mask, *outs,
        num_pid_m, heads, group, length, keys, dim, value_dim,
        *query.stride(), *key.stride(), *value.stride(), *mask_strides,
        SCALE=1 / math.sqrt(dim) if scale is None and dim else float(scale or 0), MASK=kind, CAUSAL=causal,
        HALF=size == 2, ACC=accumulator(query.dtype), FOLD=_uses_fold(query), GROUP=group if by_heads else 0,
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_D=blocks[0], BLOCK_DV=blocks[1],
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
    outs = ops.scaled_dot_product_attention.meta(query, key, value, attn_mask, is_causal, scale=scale)
    return attention(query, key, value, attn_mask, is_causal, scale, outs)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": scaled_dot_product_attention}
