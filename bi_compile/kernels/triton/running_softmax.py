"""The softmax of attention over keys that come block by block: running maximum, sum and output, and their segments.

What the kernels of `attention` and `paged_attention` share, so that the same keys have the same bits in both.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, cdiv, launch, target
from .reduce import divide, exp, fold
from .tiles import FEW, SEGMENT


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


def ends_of_segments(keys: int) -> list[int]:
    """The key behind each segment that ends up to `keys`: n keys have as many segments as the first end that is not below n says."""
    return [n for n in range(SEGMENT, keys + 1, SEGMENT) if _segments(n) < _segments(n + 1)]
