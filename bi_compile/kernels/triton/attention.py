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

from .launch import accumulator, cdiv, choose, launch, target
from .reduce import divide, exp, fold
from .tiles import ATTENTION, ATTENTION_HEAD, FEW, LONG_HEADS, LONGEST_HEAD, SEGMENT, Tile


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b. In float64, which `tl.dot` does not take everywhere, the sum of the broadcast products."""
    if a.dtype == tl.float64:
        result = acc + fold(a[:, :, None] * b[None, :, :])
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def _exp(x, EXP: tl.constexpr):
    """e**x (EXP 0); the hardware's exponential where the result is rounded to 16 bits anyway: of e (1), of 2 (2)."""
    if EXP == 2:
        result = tl.exp2(x)
    elif EXP == 1:
        result = tl.exp(x)
    else:
        result = exp(x)
    return result


@triton.jit
def _log(x, EXP: tl.constexpr):
    """The logarithm to `_exp`'s base."""
    if EXP == 2:
        result = tl.log2(x)
    else:
        result = tl.log(x)
    return result


@triton.jit
def _scaled(qk, SCALE: tl.constexpr, SEGMENT: tl.constexpr, ACC: tl.constexpr):
    """The scores of dot products. In segments, where blocks that are seen whole have no mask between product and difference, as one
    fused operation: a compiler could otherwise fuse the two there and not elsewhere."""
    scale = tl.full(qk.shape, SCALE, ACC)
    if SEGMENT:
        result = tl.fma(qk, scale, tl.zeros(qk.shape, ACC))
    else:
        result = qk * scale
    return result


@triton.jit
def _nothing(BLOCK_M: tl.constexpr, SUMS: tl.constexpr, BLOCK_DV: tl.constexpr, ACC: tl.constexpr):
    """Maximum [M], sums [M, SUMS] and output [M, Dv] of no key."""
    return tl.full((BLOCK_M,), float("-inf"), ACC), tl.zeros((BLOCK_M, SUMS), ACC), tl.zeros((BLOCK_M, BLOCK_DV), ACC)


@triton.jit
def _add_block(
    qk, seen, v_ptrs, inside, in_head, m_i, l_i, acc, SEEN: tl.constexpr, EXP: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """Maximum m_i, sums l_i and output acc of the keys so far with those of the next block: qk [M, N], v_ptrs [N, Dv], of which the
    keys `inside` [N] and the elements `in_head` [Dv] are there.

    The sums [M, 16] of segments are products with ones, of exp(qk - m_i) rounded to v's dtype and of what the rounding left: a dot
    has one order wherever a compiler puts a tile's elements, which `tl.sum` has not. Other sums are lanes [M, N].

    seen [M, N]: which keys a row sees. SEEN: 0 each row all of them, 1 each row at least one, 2 any or none. A block of which a
    row sees nothing leaves the row's numbers as they are, so it does not matter whether it is skipped.
    """
    if SEEN > 0:
        qk = tl.where(seen, qk, float("-inf"))
    m_ij = tl.maximum(m_i, tl.max(qk, 1))
    shift = tl.where(m_ij == float("-inf"), 0.0, m_ij)
    p = _exp(qk - shift[:, None], EXP)
    alpha = _exp(m_i - shift, EXP)
    v_block = tl.load(v_ptrs, mask=inside[:, None] & in_head[None, :], other=0.0)
    if SEGMENT:
        rounded = p.to(v_block.dtype)
        ones = tl.full((qk.shape[1], l_i.shape[1]), 1.0, v_block.dtype)
        new_l_i = _dot(rounded, ones, l_i * alpha[:, None])
        new_l_i = _dot((p - rounded.to(p.dtype)).to(v_block.dtype), ones, new_l_i)
    else:
        new_l_i = tl.fma(l_i, tl.broadcast_to(alpha[:, None], l_i.shape[0], l_i.shape[1]), p)
        rounded = p.to(v_block.dtype)
    new_acc = _dot(rounded, v_block, acc * alpha[:, None])
    if SEEN == 2:
        # 0 * NaN is NaN: a NaN in v must not reach a row that sees no key of the block
        any_seen = tl.max(seen.to(tl.int32), 1) > 0
        new_l_i = tl.where(any_seen[:, None], new_l_i, l_i)
        new_acc = tl.where(any_seen[:, None], new_acc, acc)
    return m_ij, new_l_i, new_acc


@triton.jit
def _segment(key, SEGMENT: tl.constexpr):
    """How many keys the segment that `key` is in has: SEGMENT, from key 8 * SEGMENT on twice, from 32 * SEGMENT on four times as many."""
    return tl.where(key < 8 * SEGMENT, SEGMENT, tl.where(key < 32 * SEGMENT, 2 * SEGMENT, 4 * SEGMENT))


@triton.jit
def _first_key(segment, SEGMENT: tl.constexpr):
    """The first key of a segment."""
    later = tl.where(
        segment < 20, 8 * SEGMENT + (segment - 8) * 2 * SEGMENT, 32 * SEGMENT + (segment - 20) * 4 * SEGMENT
    )
    return tl.where(segment < 8, segment * SEGMENT, later)


@triton.jit
def _afresh(fresh, m_i, l_i, acc):
    """`_nothing` where a segment begins, else what was found so far."""
    return tl.where(fresh, float("-inf"), m_i), tl.where(fresh, 0.0, l_i), tl.where(fresh, 0.0, acc)


@triton.jit
def _join(m_all, l_all, acc_all, m_i, l_i, acc, EXP: tl.constexpr):
    """Maximum, sums and output of the segments so far, [M], [M, 16] and [M, Dv], with those of the next.

    Joined to nothing (-inf, 0, 0), a segment's numbers are what they were; one of which a row sees nothing changes none.
    """
    m = tl.maximum(m_all, m_i)
    shift = tl.where(m == float("-inf"), 0.0, m)
    before = _exp(m_all - shift, EXP)[:, None]
    ahead = _exp(m_i - shift, EXP)[:, None]
    l_all = tl.fma(l_all, tl.broadcast_to(before, l_all.shape[0], l_all.shape[1]), l_i * ahead)
    return m, l_all, tl.fma(acc_all, tl.broadcast_to(before, acc.shape[0], acc.shape[1]), acc * ahead)


@triton.jit
def _add_next(
    qk, seen, v_ptrs, inside, in_head, start_n, end, m_i, l_i, acc, m_all, l_all, acc_all,
    SEEN: tl.constexpr, EXP: tl.constexpr, SEGMENT: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """`_add_block` of the keys from start_n on. JOIN: a segment that begins there begins from nothing, one that ends there is joined
    to those before it, but for the last, which ends at `end`."""
    if JOIN:
        size = _segment(start_n, SEGMENT)
        m_i, l_i, acc = _afresh(start_n % size == 0, m_i, l_i, acc)
    m_i, l_i, acc = _add_block(qk, seen, v_ptrs, inside, in_head, m_i, l_i, acc, SEEN, EXP, SEGMENT)
    if JOIN:
        behind = start_n + seen.shape[1]
        if (behind % size == 0) & (behind < end):
            m_all, l_all, acc_all = _join(m_all, l_all, acc_all, m_i, l_i, acc, EXP)
    return m_i, l_i, acc, m_all, l_all, acc_all


@triton.jit
def _total(l_i, FOLD: tl.constexpr, SEGMENT: tl.constexpr):
    """The sum of each row [M] from its sums, which in segments are all the same."""
    if SEGMENT:
        result = tl.max(l_i, 1)
    elif FOLD:
        result = tl.reshape(fold(l_i[:, :, None]), (l_i.shape[0],))
    else:
        result = tl.sum(l_i, 1)
    return result


@triton.jit
def _finish(m_i, total, acc, EXP: tl.constexpr):
    """The output and the logsumexp of rows: 0 and -inf of a row that sees no key."""
    no_key = total == 0.0
    total = tl.where(no_key, 1.0, total)
    acc = divide(acc, tl.broadcast_to(total[:, None], acc.shape[0], acc.shape[1]))
    logsumexp = m_i + _log(total, EXP)
    if EXP == 2:
        logsumexp = logsumexp * 0.6931471805599453
    return acc, tl.where(no_key, float("-inf"), logsumexp)


@triton.jit
def _store_part(partial, m_i, l_i, acc, row, valid, in_head, any_key, part, parts, rows, DV):
    """What a program found of the segment `part`, for `_join_parts`: maximum and sum [M] and, if it has `any_key`, output [M, Dv].

    partial: [parts, rows] of maxima, as many sums, and [parts, rows, Dv].
    """
    stored = tl.cast(rows, tl.int64) * parts
    at = tl.cast(part, tl.int64) * rows + row
    tl.store(partial + at, m_i, mask=valid)
    tl.store(partial + stored + at, l_i, mask=valid)
    if any_key:
        acc_ptrs = partial + 2 * stored + at[:, None] * DV + tl.arange(0, acc.shape[1])[None, :]
        tl.store(acc_ptrs, acc, mask=valid[:, None] & in_head[None, :])


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
    maximum, a sum (a dot with ones after the other) and an output of its own, which `_join` takes together, ascending. SPLIT: a
    program takes one of the `parts` segments and stores what it found (`_store_part`). SEGMENT 0: lane j of
    BLOCK_N adds up the keys j, j + BLOCK_N, ... ascending, then `fold`, or `tl.sum` if not FOLD.

    Row r of a key head's queries is query r // group of its head r % group. Causal blocks behind the tile's last query are
    skipped. CAUSAL: 2 where a query may see nothing of a block that the tile takes. MASK: 0 none, 1 bool, 2 float.
    GROUP: `group`, where the output is stored by queries and heads; 0: by rows.
    """
    index = tl.program_id(0)
    begin = 0
    end = S
    if SPLIT:
        begin = _first_key(index % parts, SEGMENT)
        end = tl.minimum(S, begin + _segment(begin, SEGMENT))
        index = index // parts
    off_zh = (index // num_pid_m).to(tl.int64)
    off_z = off_zh // heads
    off_h = off_zh % heads
    m0 = index % num_pid_m * BLOCK_M
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
    k_base = k + off_z * stride_kz + off_h * stride_kh
    v_base = v + off_z * stride_vz + off_h * stride_vh
    if MASK:
        mask_ptrs = mask + off_z * stride_maskz + q_head[:, None] * stride_maskh + query[:, None] * stride_maskm
        mask_ptrs += offs_n[None, :] * stride_maskn
    row = (off_z * heads * group + q_head) * L + query

    SUMS: tl.constexpr = 16 if SEGMENT else BLOCK_N
    m_i, l_i, acc = _nothing(BLOCK_M, SUMS, BLOCK_DV, ACC)
    m_all, l_all, acc_all = _nothing(BLOCK_M, SUMS, BLOCK_DV, ACC)
    if CAUSAL:
        end = tl.minimum(end, (m0 + BLOCK_M - 1) // group + 1)
    # blocks of which every row sees every key
    whole = begin
    if SEGMENT and not MASK:
        whole = end
        if CAUSAL:
            whole = tl.minimum(whole, m0 // group + 1)
        whole = tl.maximum(whole // BLOCK_N * BLOCK_N, begin)
    for STAGE in tl.static_range(0 if SEGMENT and not MASK else 1, 2):
        for start_n in range(begin if STAGE == 0 else whole, whole if STAGE == 0 else end, BLOCK_N):
            inside = offs_key < (BLOCK_N if STAGE == 0 else S - start_n)
            start = tl.cast(start_n, tl.int64)
            k_ptrs = k_base + start * stride_kn + offs_n[None, :] * stride_kn + offs_d[:, None] * stride_kd
            k_block = tl.load(k_ptrs, mask=inside[None, :] & (offs_d < D)[:, None], other=0.0)
            qk = _dot(q_block, k_block, tl.zeros((BLOCK_M, BLOCK_N), ACC))
            seen = valid[:, None] & inside[None, :]
            if CAUSAL:
                seen = seen & (start_n + offs_key[None, :] <= position[:, None])
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
            v_ptrs = v_base + start * stride_vn + offs_n[:, None] * stride_vn + offs_dv[None, :] * stride_vd
            SEEN: tl.constexpr = 0 if STAGE == 0 else 2 if CAUSAL > 1 or MASK else 1
            m_i, l_i, acc, m_all, l_all, acc_all = _add_next(
                qk, seen, v_ptrs, inside, offs_dv < DV, start_n, end, m_i, l_i, acc, m_all, l_all, acc_all,
                SEEN, EXP, SEGMENT, SEGMENT > 0 and not SPLIT,
            )  # fmt: skip

    if SPLIT:
        l_row = _total(l_i, FOLD, SEGMENT)
        _store_part(
            partial, m_i, l_row, acc, row, valid, offs_dv < DV, begin < end, tl.program_id(0) % parts, parts, rows, DV
        )
    else:
        if SEGMENT:
            m_i, l_i, acc = _join(m_all, l_all, acc_all, m_i, l_i, acc, EXP)
        acc, logsumexp = _finish(m_i, _total(l_i, FOLD, SEGMENT), acc, EXP)
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


@triton.jit(do_not_specialize=["rows", "parts"])
def _join_parts(
    partial, out, lse, rows, parts, DV,
    EXP: tl.constexpr, ACC: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A row of the output from what was stored of its segments (`_store_part`), as one program would have joined them."""
    row = tl.program_id(0).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV)
    stride = tl.cast(rows, tl.int64)
    stored = stride * parts
    # those that hold keys that the row sees lie behind one another
    part = tl.arange(0, BLOCK_P)
    at_parts = partial + part * stride + row
    m_parts = tl.load(at_parts, mask=part < parts, other=float("-inf"))
    l_parts = tl.load(at_parts + stored, mask=part < parts, other=0.0)
    there = (m_parts != float("-inf")) | (l_parts != 0.0)
    first = tl.min(tl.where(there, part, parts), 0)
    last = tl.max(tl.where(there, part, -1), 0)
    m_all, l_all, acc_all = _nothing(1, 1, BLOCK_DV, ACC)
    for i in range(first, last + 1):
        at = partial + (i + tl.arange(0, 1)) * stride + row
        acc_ptrs = partial + 2 * stored + (i * stride + row) * DV + offs_dv[None, :]
        acc = tl.load(acc_ptrs, mask=(offs_dv < DV)[None, :], other=0.0)
        m_all, l_all, acc_all = _join(m_all, l_all, acc_all, tl.load(at), tl.load(at + stored)[:, None], acc, EXP)
    acc, logsumexp = _finish(m_all, _total(l_all, False, SEGMENT), acc_all, EXP)
    tl.store(lse + row + tl.arange(0, 1), logsumexp)
    tl.store(out + row * DV + offs_dv[None, :], acc.to(out.dtype.element_ty), mask=(offs_dv < DV)[None, :])


def _order(query: Tensor) -> dict[str, Any]:
    """How the kernels add up: the constants SEGMENT, FOLD, EXP and ACC.

    Segments in 16 bits on CUDA. Elsewhere lanes, and their `fold`, but not on Ascend, where one tile, so one compiled order, serves
    all rows and the many small dimensions of `fold` overflow the unified buffer.
    """
    half, npu = query.element_size() == 2, target(query) == "npu"
    exponential = (1 if npu else 2) if half else 0
    return {
        "SEGMENT": SEGMENT if half and not npu else 0,
        "FOLD": not npu,
        "EXP": exponential,
        "ACC": accumulator(query.dtype),
    }


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


def parts_of(programs: int, keys: int, head: int, segment: int) -> int:
    """Among how many programs the segments of `keys` keys are divided: one each where `programs` would leave the device idle."""
    return max(1, _segments(keys)) if segment and programs * head <= FEW else 1


def room_for(parts: int, outs: tuple[Tensor, Tensor]) -> Tensor | None:
    """Memory for what `parts` programs find of each row of `outs`; None where one takes all keys."""
    out, lse = outs
    return lse.new_empty(parts * (2 * lse.numel() + out.numel())) if parts > 1 else None


def join_parts(
    partial: Tensor | None, outs: tuple[Tensor, Tensor], parts: int, block_dv: int, sums: dict[str, Any]
) -> None:
    """Fill `outs` from `partial`, if the keys were divided."""
    if partial is not None:
        launch(
            _join_parts, outs[1].numel(), partial, partial, *outs, outs[1].numel(), parts, outs[0].shape[-1],
            EXP=sums["EXP"], ACC=sums["ACC"], SEGMENT=sums["SEGMENT"], BLOCK_P=triton.next_power_of_2(parts), BLOCK_DV=block_dv, num_warps=1,
        )  # fmt: skip


def _segments(keys: int) -> int:
    """How many segments `keys` keys have: see `_segment`."""
    if keys <= 8 * SEGMENT:
        return cdiv(keys, SEGMENT)
    if keys <= 32 * SEGMENT:
        return 8 + cdiv(keys - 8 * SEGMENT, 2 * SEGMENT)
    return 20 + cdiv(keys - 32 * SEGMENT, 4 * SEGMENT)


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
