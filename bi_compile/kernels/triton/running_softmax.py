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
from .tiles import AHEAD, FEW, SEGMENT


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
    qk, seen, any_seen, v_ptrs, inside, in_head, m_i, l_i, acc, SEEN: tl.constexpr, EXP: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """Maximum m_i, sums l_i and output acc of the keys so far with those of the next block: qk [M, N], v_ptrs [N, Dv], of which the
    keys `inside` [N] and the elements `in_head` [Dv] are there.

    The sums are lanes [M, N], in segments [M, N / 2], where lane j adds key j and key N / 2 + j first: both are one thread's in each layout
    of the matrix units, and a sum of two has one order, which `tl.sum` of more has not.

    seen [M, N]: which keys a row sees; any_seen [M]: whether it sees any. SEEN: 0 each row all of them, 1 each row at least one, 2 any or
    none. A block of which a row sees nothing leaves the row's numbers as they are, so it does not matter whether it is skipped.
    """
    if SEEN > 0:
        qk = tl.where(seen, qk, float("-inf"))
    m_ij = tl.maximum(m_i, tl.max(qk, 1))
    shift = tl.where(m_ij == float("-inf"), 0.0, m_ij)
    p = _exp(qk - shift[:, None], EXP)
    alpha = _exp(m_i - shift, EXP)
    v_block = tl.load(v_ptrs, mask=inside[:, None] & in_head[None, :], other=0.0)
    sums = p
    if SEGMENT:
        sums = tl.sum(tl.reshape(p, (p.shape[0], 2, p.shape[1] // 2)), 1)
    new_l_i = tl.fma(l_i, tl.broadcast_to(alpha[:, None], l_i.shape[0], l_i.shape[1]), sums)
    new_acc = _dot(p.to(v_block.dtype), v_block, acc * alpha[:, None])
    if SEEN == 2:
        # 0 * NaN is NaN: a NaN in v must not reach a row that sees no key of the block
        new_l_i = tl.where(any_seen[:, None], new_l_i, l_i)
        new_acc = tl.where(any_seen[:, None], new_acc, acc)
    return m_ij, new_l_i, new_acc


@triton.jit
def _segment(key, SEGMENT: tl.constexpr):
    """How many keys the segment that `key` is in has: SEGMENT, from key 8 * SEGMENT on twice, from 32 * SEGMENT on four times as many."""
    return tl.where(key < 8 * SEGMENT, SEGMENT, tl.where(key < 32 * SEGMENT, 2 * SEGMENT, 4 * SEGMENT))


@triton.jit
def _behind(key, SEGMENT: tl.constexpr):
    """The first key behind the segment that `key` is in."""
    size = _segment(key, SEGMENT)
    return (key // size + 1) * size


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
    """Maximum, sum and output of the segments so far, [M], [M] and [M, Dv], with those of the next.

    Joined to nothing (-inf, 0, 0), a segment's numbers are what they were; one of which a row sees nothing changes none.
    """
    m = tl.maximum(m_all, m_i)
    shift = tl.where(m == float("-inf"), 0.0, m)
    before = _exp(m_all - shift, EXP)
    ahead = _exp(m_i - shift, EXP)
    l_all = tl.fma(l_all, before, l_i * ahead)
    acc_all = tl.fma(acc_all, tl.broadcast_to(before[:, None], acc.shape[0], acc.shape[1]), acc * ahead[:, None])
    return m, l_all, acc_all


@triton.jit
def _total(l_i, FOLD: tl.constexpr):
    """The sum of each row [M] from its lanes."""
    if FOLD:
        result = tl.reshape(fold(l_i[:, :, None]), (l_i.shape[0],))
    else:
        result = tl.sum(l_i, 1)
    return result


@triton.jit
def _add_next(
    qk, seen, any_seen, v_ptrs, inside, in_head, start_n, end, m_i, l_i, acc, m_all, l_all, acc_all,
    SEEN: tl.constexpr, EXP: tl.constexpr, SEGMENT: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """`_add_block` of the keys from start_n on. JOIN: a segment that begins there begins from nothing, one that ends there is joined
    to those before it, but for the last, which ends at `end`."""
    if JOIN:
        size = _segment(start_n, SEGMENT)
        m_i, l_i, acc = _afresh(start_n % size == 0, m_i, l_i, acc)
    m_i, l_i, acc = _add_block(qk, seen, any_seen, v_ptrs, inside, in_head, m_i, l_i, acc, SEEN, EXP, SEGMENT)
    if JOIN:
        behind = start_n + seen.shape[1]
        if (behind % size == 0) & (behind < end):
            m_all, l_all, acc_all = _join(m_all, l_all, acc_all, m_i, _total(l_i, True), acc, EXP)
    return m_i, l_i, acc, m_all, l_all, acc_all


@triton.jit
def _finish(m_i, total, acc, EXP: tl.constexpr):
    """The output and the logsumexp of rows: 0 and -inf of a row that sees no key."""
    no_key = total == 0.0
    total = tl.where(no_key, 1.0, total)
    if EXP == 2:  # rounded to 16 bits anyway
        acc = acc * divide(tl.full(total.shape, 1.0, total.dtype), total)[:, None]
    else:
        acc = divide(acc, tl.broadcast_to(total[:, None], acc.shape[0], acc.shape[1]))
    logsumexp = m_i + _log(total, EXP)
    if EXP == 2:
        logsumexp = logsumexp * 0.6931471805599453
    return acc, tl.where(no_key, float("-inf"), logsumexp)


@triton.jit
def _store_part(partial, m_i, l_i, acc, row, valid, in_head, any_key, part, parts, rows, DV):
    """What a program found of the segment `part`, for `_join_parts`: maximum and sum [M] and output [M, Dv]; -1 for the sum, and no output,
    if it had no key.

    partial: [parts, rows] of maxima, as many sums, and [parts, rows, Dv].
    """
    stored = tl.cast(rows, tl.int64) * parts
    at = tl.cast(part, tl.int64) * rows + row
    tl.store(partial + at, m_i, mask=valid)
    tl.store(partial + stored + at, tl.where(any_key, l_i, -1.0), mask=valid)
    if any_key:
        acc_ptrs = partial + 2 * stored + at[:, None] * DV + tl.arange(0, acc.shape[1])[None, :]
        tl.store(acc_ptrs, acc, mask=valid[:, None] & in_head[None, :])


@triton.jit
def _part_of(program, programs, parts):
    """The segment that a program takes, and the index of its tile among `programs // parts`.

    All tiles' last segments begin first: they are the longest, and the short ones then fill what these leave idle.
    """
    tiles = programs // parts
    return parts - 1 - program // tiles, program % tiles


@triton.jit(do_not_specialize=["rows", "parts"])
def _join_parts(
    partial, out, lse, rows, parts, DV,
    EXP: tl.constexpr, ACC: tl.constexpr, BLOCK_DV: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A row of the output from what was stored of its segments (`_store_part`), as one program would have joined them.

    AHEAD: how many of them are read, one load behind the other, before the first is joined.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offs_dv = tl.arange(0, BLOCK_DV)
    stride = tl.cast(rows, tl.int64)
    m_all = tl.full((1,), float("-inf"), ACC)
    l_all = tl.zeros((1,), ACC)
    acc_all = tl.zeros((1, BLOCK_DV), ACC)
    for first in range(0, parts, AHEAD):
        read = ()
        for i in tl.static_range(AHEAD):
            part = first + i + tl.arange(0, 1)
            there = part < parts
            at = partial + part * stride + row
            acc_ptrs = partial + 2 * stride * parts + (part * stride + row)[:, None] * DV + offs_dv[None, :]
            m_i = tl.load(at, mask=there, other=float("-inf"))
            l_i = tl.load(at + stride * parts, mask=there, other=-1.0)
            acc = tl.load(acc_ptrs, mask=there[:, None] & (offs_dv < DV)[None, :], other=0.0)
            read = read + ((m_i, l_i, acc),)  # type: ignore[assignment]  # noqa: RUF005  Triton does not unpack
        for i in tl.static_range(AHEAD):
            m_i, l_i, acc = read[i]
            no_key = l_i < 0.0
            l_i = tl.where(no_key, 0.0, l_i)
            acc = tl.where(no_key[:, None], 0.0, acc)  # type: ignore[index]
            m_all, l_all, acc_all = _join(m_all, l_all, acc_all, m_i, l_i, acc, EXP)
    acc, logsumexp = _finish(m_all, l_all, acc_all, EXP)
    tl.store(lse + row, logsumexp)
    tl.store(out + row[:, None] * DV + offs_dv[None, :], acc.to(out.dtype.element_ty), mask=(offs_dv < DV)[None, :])


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
            EXP=sums["EXP"], ACC=sums["ACC"], BLOCK_DV=block_dv, AHEAD=AHEAD, num_warps=1,
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
