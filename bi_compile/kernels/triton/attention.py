"""Attention: one program for each tile of queries, which takes the keys in ascending order."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from .launch import cdiv, choose, launch, target
from .running_softmax import (
    _add_block,
    _add_next,
    _dot,
    _finish,
    _first_key,
    _join,
    _nothing,
    _order,
    _part_of,
    _scaled,
    _segment,
    _store_part,
    _total,
    join_parts,
    parts_of,
    room_for,
)
from .tiles import ATTENTION, ATTENTION_HEAD, LONG_HEADS, LONGEST_HEAD, Tile


@triton.jit
def _block(
    q_block, k_base, v_base, mask_ptrs, start_n, S, valid, position, D, stride_kn, stride_kd, stride_vn, stride_vd, stride_maskn,
    SCALE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EXP: tl.constexpr, ACC: tl.constexpr, SEGMENT: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Of the BLOCK_N keys from start_n on: scores [M, N], which of them a row sees and whether any, where the values [N, Dv] lie, and which
    [N] are there. WHOLE: all are."""
    # masks in 32 bits: Ascend's vector unit does not compare 64, and its compiler then takes one element after the other
    offs_key = tl.arange(0, BLOCK_N)
    offs_n = offs_key.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_key < (BLOCK_N if WHOLE else S - start_n)
    start = tl.cast(start_n, tl.int64)
    k_ptrs = k_base + start * stride_kn + offs_n[None, :] * stride_kn + offs_d[:, None] * stride_kd
    k_block = tl.load(k_ptrs, mask=inside[None, :] & (offs_d < D)[:, None], other=0.0)
    qk = _dot(q_block, k_block, tl.zeros((BLOCK_M, BLOCK_N), ACC))
    seen = valid[:, None] & inside[None, :]
    any_seen = valid
    if CAUSAL:
        seen = seen & (start_n + offs_key[None, :] <= position[:, None])
        any_seen = valid & (start_n <= position)
    if MASK == 1:
        seen = seen & (tl.load(mask_ptrs + start * stride_maskn, mask=seen, other=0) != 0)
    if MASK == 2:
        addend = tl.load(mask_ptrs + start * stride_maskn, mask=seen, other=float("-inf")).to(ACC)
        seen = seen & (addend != float("-inf"))
        if EXP == 2:
            addend = addend * 1.4426950408889634
        qk = tl.fma(qk, tl.full((BLOCK_M, BLOCK_N), SCALE, ACC), addend)
    else:
        qk = _scaled(qk, SCALE, SEGMENT, ACC)
    if MASK:
        any_seen = tl.max(seen.to(tl.int32), 1) > 0
    v_ptrs = v_base + start * stride_vn + offs_n[:, None] * stride_vn + tl.arange(0, BLOCK_DV)[None, :] * stride_vd
    return qk, seen, any_seen, v_ptrs, inside


@triton.jit(do_not_specialize=["L", "S", "num_pid_m", "parts", "rows"])
def _attention(
    q, k, v, mask, out, lse, partial, num_pid_m, parts, rows, heads, group, L, S, D, DV,
    stride_qz, stride_qh, stride_qm, stride_qd, stride_kz, stride_kh, stride_kn, stride_kd,
    stride_vz, stride_vh, stride_vn, stride_vd, stride_maskz, stride_maskh, stride_maskm, stride_maskn,
    SCALE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EXP: tl.constexpr, ACC: tl.constexpr,
    FOLD: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys in blocks of BLOCK_N, ascending, with running maximum m_i, sum l_i and output acc in float32.

    The output: one dot after the other. In float64 a dot is a `fold` of the products. SEGMENT: each segment (`_segment`) has a
    maximum, sums (`_add_block`) and an output of its own, which `_join` takes together, ascending. SPLIT: a
    program takes one of the `parts` segments and stores what it found (`_store_part`). SEGMENT 0: lane j of
    BLOCK_N adds up the keys j, j + BLOCK_N, ... ascending, then `fold`, or `tl.sum` if not FOLD.

    Row r of a key head's queries is query r // group of its head r % group. Causal blocks behind the tile's last query are
    skipped. CAUSAL: 2 where a query may see nothing of a block that the tile takes. MASK: 0 none, 1 bool, 2 float.
    GROUP: `group`, where the output is stored by queries and heads; 0: by rows.
    """
    index = tl.program_id(0)
    begin = 0
    end = S
    part = 0
    if SPLIT:
        part, index = _part_of(index, tl.num_programs(0), parts)
        begin = _first_key(part, SEGMENT)
        end = tl.minimum(S, begin + _segment(begin, SEGMENT))
    if CAUSAL > 0 and (not SPLIT and BLOCK_M >= 64):
        # the last queries see the most keys: their tiles begin first, so that none of them ends alone
        of_keys = tl.num_programs(0) // num_pid_m
        off_zh = (index % of_keys).to(tl.int64)
        m0 = (num_pid_m - 1 - index // of_keys) * BLOCK_M
    else:
        off_zh = (index // num_pid_m).to(tl.int64)
        m0 = index % num_pid_m * BLOCK_M
    off_z = off_zh // heads
    off_h = off_zh % heads
    offs_m = m0 + tl.arange(0, BLOCK_M)
    position = offs_m // group
    query = position.to(tl.int64)
    q_head = off_h * group + offs_m % group
    valid = position < L
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)

    q_ptrs = (
        q + off_z * stride_qz + q_head[:, None] * stride_qh + query[:, None] * stride_qm + offs_d[None, :] * stride_qd
    )
    q_block = tl.load(q_ptrs, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
    k_base = k + off_z * stride_kz + off_h * stride_kh
    v_base = v + off_z * stride_vz + off_h * stride_vh
    mask_ptrs = mask
    if MASK:
        mask_ptrs += off_z * stride_maskz + q_head[:, None] * stride_maskh + query[:, None] * stride_maskm
        mask_ptrs += tl.arange(0, BLOCK_N).to(tl.int64)[None, :] * stride_maskn
    row = (off_z * heads * group + q_head) * L + query

    SUMS: tl.constexpr = BLOCK_N // 2 if SEGMENT else BLOCK_N
    m_i, l_i, acc = _nothing(BLOCK_M, SUMS, BLOCK_DV, ACC)
    m_all, l_all, acc_all = m_i, tl.zeros((BLOCK_M,), ACC), acc
    if CAUSAL:
        end = tl.minimum(end, (m0 + BLOCK_M - 1) // group + 1)
    # blocks of which every row sees every key
    whole = begin
    if SEGMENT and not MASK:
        whole = end
        if CAUSAL:
            whole = tl.minimum(whole, m0 // group + 1)
        whole = tl.maximum(whole // BLOCK_N * BLOCK_N, begin)
    SEEN: tl.constexpr = 2 if CAUSAL > 1 or MASK else 1
    if SEGMENT > 0 and (not SPLIT and BLOCK_M >= 64):
        # a loop for each segment: a join within the loop over its blocks would have the warp group wait for each of its products
        first_n = begin
        while first_n < end:
            next_n = tl.minimum(first_n + _segment(first_n, SEGMENT), end)
            next_whole = tl.minimum(tl.maximum(whole, first_n), next_n)
            m_i, l_i, acc = _nothing(BLOCK_M, SUMS, BLOCK_DV, ACC)
            for STAGE in tl.static_range(1 if MASK else 0, 2):
                begin_n = first_n if STAGE == 0 else next_whole
                end_n = next_whole if STAGE == 0 else next_n
                if STAGE == 0 or begin_n < end_n:  # a loop has its first loads, though it may be empty
                    for start_n in range(begin_n, end_n, BLOCK_N):
                        qk, seen, any_seen, v_ptrs, inside = _block(
                            q_block, k_base, v_base, mask_ptrs, start_n, S, valid, position, D, stride_kn, stride_kd, stride_vn, stride_vd,
                            stride_maskn, SCALE, MASK, CAUSAL, EXP, ACC, SEGMENT, STAGE == 0, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                        )  # fmt: skip
                        m_i, l_i, acc = _add_block(
                            qk, seen, any_seen, v_ptrs, inside, offs_dv < DV, m_i, l_i, acc, SEEN * STAGE, EXP, SEGMENT
                        )
            m_all, l_all, acc_all = _join(m_all, l_all, acc_all, m_i, _total(l_i, FOLD), acc, EXP)
            first_n = next_n
        m_i, l_row, acc = m_all, l_all, acc_all
    else:
        for STAGE in tl.static_range(0 if SEGMENT and not MASK else 1, 2):
            for start_n in range(begin if STAGE == 0 else whole, whole if STAGE == 0 else end, BLOCK_N):
                qk, seen, any_seen, v_ptrs, inside = _block(
                    q_block, k_base, v_base, mask_ptrs, start_n, S, valid, position, D, stride_kn, stride_kd, stride_vn, stride_vd,
                    stride_maskn, SCALE, MASK, CAUSAL, EXP, ACC, SEGMENT, STAGE == 0, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                m_i, l_i, acc, m_all, l_all, acc_all = _add_next(
                    qk, seen, any_seen, v_ptrs, inside, offs_dv < DV, start_n, end, m_i, l_i, acc, m_all, l_all, acc_all,
                    SEEN * STAGE, EXP, SEGMENT, SEGMENT > 0 and not SPLIT,
                )  # fmt: skip
        l_row = _total(l_i, FOLD)
        if SEGMENT > 0 and not SPLIT:
            m_i, l_row, acc = _join(m_all, l_all, acc_all, m_i, l_row, acc, EXP)

    if SPLIT:
        _store_part(partial, m_i, l_row, acc, row, valid, offs_dv < DV, begin < end, part, parts, rows, DV)
    else:
        acc, logsumexp = _finish(m_i, l_row, acc, EXP)
        tl.store(lse + row, logsumexp, mask=valid)
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
                (ahead < L - first)[:, None, None]
                & (heads_ahead < GROUP)[None, :, None]
                & (offs_dv < DV)[None, None, :]
            )
            tl.store(out_ptrs, tl.reshape(acc.to(out.dtype.element_ty), (QUERIES, HEADS, BLOCK_DV)), mask=there)
        else:
            out_ptrs = out + row[:, None] * DV + offs_dv[None, :]
            tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=valid[:, None] & (offs_dv < DV)[None, :])


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


def tile_of(query: Tensor, rows: int, head: int) -> Tile:
    """The tile for `rows` rows and heads of `head` elements, padded: with fewer rows and stages where they would overflow memory."""
    device, size = target(query), query.element_size()
    longest = ATTENTION_HEAD[device][1]
    if device == "cuda" and size == 2 and head > longest:
        tile = LONG_HEADS
    else:
        tile = choose(ATTENTION[device][size], rows if _tall_tiles_are_compared(query.device) else min(rows, 32))
        height = tile.height if head <= longest else min(tile.height, 16)
        tile = tile._replace(height=height, warps=max(1, tile.warps * height // tile.height))
    return tile._replace(stages=max(1, min(tile.stages, 512 // head)))


@functools.cache
def _tall_tiles_are_compared(device: torch.device) -> bool:
    """Whether tiles of 64 rows and more, which run on other matrix instructions, are known to have the bits of lower ones: on Hopper."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def _mask(mask: Tensor | None, query: Tensor, shape: list[int]) -> tuple[int, Tensor | None, tuple[int, ...]]:
    """Kind of the mask for the kernel, the mask as bytes or floats, its strides over [B, Hq, L, S].

    On CUDA a bool mask becomes one of 0 and -inf in the query's dtype: where a mask is loaded in bytes, Triton takes the pairs of keys that
    the matrix units add up from the bytes, in tiles of up to 32 rows, so bits would follow the mask's dtype and the tile.
    """
    if mask is None:
        return 0, None, (0, 0, 0, 0)
    if mask.dtype == torch.bool and target(query) != "npu":
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
            mask.logical_not(), -math.inf
        )
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
    kind, mask, mask_strides = _mask(mask, query, [batches, q_heads, length, keys])
    group = q_heads // heads
    device = target(query)
    padded = blocks_of_head("scaled_dot_product_attention", query, dim, value_dim)
    sums, rows = _order(query), outs[1].numel()
    tile = tile or tile_of(query, length * group, max(padded))
    num_pid_m = cdiv(length * group, tile.height)
    programs = batches * heads * num_pid_m
    parts = parts_of(programs, keys, max(padded), sums["SEGMENT"])
    partial = room_for(parts, outs)
    # where a tile's queries lie within one block of keys, each of them sees the first key of the last block
    seen = 0 if not causal else 1 if tile.height % group == 0 and tile.height <= tile.width * group else 2
    # an Ascend 950 has no room for the longest heads' output twice
    by_heads = device == "npu" and group & (group - 1) == 0 and padded[1] < 512
    launch(
        _attention, programs * parts, query, query, key, value, mask, *outs, partial,
        num_pid_m, parts, rows, heads, group, length, keys, dim, value_dim,
        *query.stride(), *key.stride(), *value.stride(), *mask_strides,
        SCALE=scale_of(scale, dim, sums["EXP"]), MASK=kind, CAUSAL=seen, GROUP=group if by_heads else 0, SPLIT=parts > 1,
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_D=padded[0], BLOCK_DV=padded[1], num_warps=tile.warps, num_stages=tile.stages,
        **sums,
    )  # fmt: skip
    join_parts(partial, outs, parts, padded[1], sums)
    return outs


def scale_of(scale: float | None, length: int, exponential: int) -> float:
    """What scores are multiplied by: `scale`, or that of heads of `length` elements, to the base of the exponential."""
    if scale is None:
        scale = 1 / math.sqrt(length) if length else 0.0
    return scale * math.log2(math.e) if exponential == 2 else float(scale)


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
