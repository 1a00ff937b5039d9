"""Attention of a server's step, one launch for all requests: keys in pages, lengths and block table read on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from .attention import blocks_of_head, scale_of, tile_of
from .launch import cdiv, launch, target
from .running_softmax import (
    _add_block,
    _add_next,
    _behind,
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
from .tiles import ATTENTION, ATTENTION_HEAD, LONGEST_HEAD_GATHERED, MANY, REQUESTS, Tile

#: how the kernel finds keys: packed one request after the other; by pages that hold whole tiles of keys; by other pages
PACKED, WHOLE_TILES, PAGES = 0, 1, 2
#: more keys than any request has: no limit of the window
UNLIMITED = 2**30
#: whose queries a launch takes: every request's; those of requests with more rows than the lowest tile has; the other requests'
ALL, LONG, SHORT = 0, 1, 2


@triton.jit
def _request_of(ends, requests, index, group, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """The request of tile `index`: request i has the tiles from (its first token * group) // BLOCK_M + i on.

    Request `requests` are the tokens behind the last one, which see no key.
    """
    offs = tl.arange(0, BLOCK_R)
    found = 0
    for start in range(0, requests, BLOCK_R):
        there = offs < requests - start
        end = tl.load(ends + start + offs, mask=there, other=0)
        # the first tile of the request behind each
        behind = end * group // BLOCK_M + start + offs + 1
        found += tl.sum((there & (behind <= index)).to(tl.int32), 0)
    return found


@triton.jit
def _page_of(pages, start_n, S, PAGE: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which pages of the cache hold the keys from start_n on, of S: one for all BLOCK_N keys (WHOLE_TILES), or each key's [N].

    pages: a request's row of the block table. AHEAD: there may be none from start_n on.
    """
    if KEYS == 0:
        result = tl.zeros((), tl.int32)
    elif KEYS == 1:
        if AHEAD:
            result = tl.load(pages + start_n // PAGE, mask=start_n < S, other=0)
        else:
            result = tl.load(pages + start_n // PAGE)
    else:
        offs_key = tl.arange(0, BLOCK_N)
        result = tl.load(pages + (start_n + offs_key) // PAGE, mask=offs_key < S - start_n, other=0)
    return result


@triton.jit
def _block(
    q_block, qr_block, k, v, k_rope, block, start_n, S, first_key, off_h, position, last_key, D, DV, DR, left, right,
    stride_kp, stride_kn, stride_kh, stride_kd, stride_vp, stride_vn, stride_vh, stride_vd,
    stride_krp, stride_krn, stride_krh, stride_krd,
    SCALE: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, ROPE: tl.constexpr, ACC: tl.constexpr, SEGMENT: tl.constexpr,
    WHOLE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DR: tl.constexpr,
):  # fmt: skip
    """`attention._block` where keys lie in pages: of the BLOCK_N keys from start_n on scores [M, N], which of them a row sees and whether any,
    where the values [N, Dv] lie, and which [N] are there. block: `_page_of` them. last_key [M]: the last that a row sees. WINDOW: `left`
    says the first. WHOLE: all are there."""
    # masks in 32 bits: Ascend's vector unit does not compare 64, and its compiler then takes one element after the other
    offs_key = tl.arange(0, BLOCK_N)
    offs_n = offs_key.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_dr = tl.arange(0, BLOCK_DR)
    inside = offs_key < (BLOCK_N if WHOLE else S - start_n)
    block = block.to(tl.int64)
    if KEYS == 0:
        k_base = k + (first_key + start_n).to(tl.int64) * stride_kn
        v_base = v + (first_key + start_n).to(tl.int64) * stride_vn
        kr_base = k_rope + (first_key + start_n).to(tl.int64) * stride_krn
        k_offs = offs_n * stride_kn
        v_offs = offs_n * stride_vn
        kr_offs = offs_n * stride_krn
    elif KEYS == 1:
        within = tl.cast(start_n % PAGE, tl.int64)
        k_base = k + block * stride_kp + within * stride_kn
        v_base = v + block * stride_vp + within * stride_vn
        kr_base = k_rope + block * stride_krp + within * stride_krn
        k_offs = offs_n * stride_kn
        v_offs = offs_n * stride_vn
        kr_offs = offs_n * stride_krn
    else:
        n = start_n + offs_n
        k_base = k
        v_base = v
        kr_base = k_rope
        k_offs = block * stride_kp + n % PAGE * stride_kn
        v_offs = block * stride_vp + n % PAGE * stride_vn
        kr_offs = block * stride_krp + n % PAGE * stride_krn
    k_ptrs = k_base + off_h * stride_kh + k_offs[None, :] + offs_d[:, None] * stride_kd
    k_block = tl.load(k_ptrs, mask=inside[None, :] & (offs_d < D)[:, None], other=0.0)
    qk = _dot(q_block, k_block, tl.zeros((BLOCK_M, BLOCK_N), ACC))
    if ROPE:
        kr_ptrs = kr_base + off_h * stride_krh + kr_offs[None, :] + offs_dr[:, None] * stride_krd
        kr_block = tl.load(kr_ptrs, mask=inside[None, :] & (offs_dr < DR)[:, None], other=0.0)
        qk = _dot(qr_block, kr_block, qk)
    qk = _scaled(qk, SCALE, SEGMENT, ACC)
    key = start_n + offs_key[None, :]
    seen = key <= last_key[:, None]
    any_seen = start_n <= last_key
    if WINDOW:
        seen = seen & (key >= (position - left)[:, None])
        any_seen = any_seen & (tl.minimum(start_n + BLOCK_N, S) - 1 >= position - left) & (right >= -left)
    v_ptrs = v_base + off_h * stride_vh + v_offs[:, None] + offs_dv[None, :] * stride_vd
    return qk, seen, any_seen, v_ptrs, inside


@triton.jit(
    do_not_specialize=["tokens", "requests", "tiles", "parts", "left", "right", "stride_table"],
    do_not_specialize_on_alignment=["ends", "counts"],
)
def _paged_attention(
    q, k, v, q_rope, k_rope, ends, counts, table, out, lse, partial,
    tokens, requests, tiles, parts, group, D, DV, DR, left, right,
    stride_qt, stride_qh, stride_qd, stride_kp, stride_kn, stride_kh, stride_kd,
    stride_vp, stride_vn, stride_vh, stride_vd, stride_qrt, stride_qrh, stride_qrd,
    stride_krp, stride_krn, stride_krh, stride_krd, stride_table,
    SCALE: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, ROPE: tl.constexpr, EXP: tl.constexpr, ACC: tl.constexpr,
    FOLD: tl.constexpr, SEGMENT: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, WHICH: tl.constexpr, FEW_ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DR: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`attention._attention` for a tile of one request's queries: the same blocks of BLOCK_N keys, ascending from key 0 of
    the request, and the same sums, so the same bits, divided by segments (SPLIT) or not. Where a key lies changes nothing but its address.

    ends, counts [requests]: ends of the requests' tokens; numbers of their keys (PACKED: ends). Query i of L sees the keys
    from S - L + i - left to S - L + i + right of S. Blocks that no query of the tile sees are skipped, which leaves every
    number as it is. ROPE: the rotated part of a head, [.., DR], is added to a score after the D of its other part.

    WHICH: LONG, only requests with more than FEW_ROWS rows (queries times GROUP) and the tokens behind the last request; SHORT, only the
    other requests, tile i being request i's, and in tiles from `requests` on the tokens behind the last.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    part = 0
    if SPLIT:
        part, program = _part_of(program, programs, parts)
        programs = programs // parts
    if BLOCK_M >= 64:
        # a request's last queries see the most keys: the last tiles begin first, so that none of them ends alone
        of_keys = programs // tiles
        index = tiles - 1 - program // of_keys
        off_h = (program % of_keys).to(tl.int64)
    else:
        index = program % tiles
        off_h = (program // tiles).to(tl.int64)
    if WHICH == 2:
        request = tl.minimum(index, requests)
    else:
        request = _request_of(ends, requests, index, GROUP, BLOCK_M, BLOCK_R)
    last = tl.minimum(request, requests - 1)
    behind = request == requests
    token = tl.where(request > 0, tl.load(ends + tl.maximum(request - 1, 0)), 0)
    L = tl.where(behind, tokens, tl.load(ends + last)) - token
    if WHICH == 1:
        if (L * GROUP <= FEW_ROWS) & (request < requests):
            return
    if WHICH == 2:
        if (L * GROUP > FEW_ROWS) & (request < requests):
            return
    S = tl.load(counts + last)
    first_key = tl.zeros((), tl.int32)
    if KEYS == 0:
        first_key = tl.where(request > 0, tl.load(counts + tl.maximum(last - 1, 0)), 0)
        S = S - first_key
    S = tl.where(behind, 0, S)

    if WHICH == 2:
        m0 = tl.maximum(index - requests, 0) * BLOCK_M
    else:
        m0 = (index - (token * GROUP // BLOCK_M + request)) * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    query = offs_m // GROUP
    q_head = off_h * group + offs_m % GROUP
    valid = (query < L) & (offs_m % GROUP < group)
    row = (token + query).to(tl.int64)
    position = S - L + query
    last_key = tl.where(valid, tl.minimum(position + right, S - 1), -1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)

    q_ptrs = q + row[:, None] * stride_qt + q_head[:, None] * stride_qh + offs_d[None, :] * stride_qd
    q_block = tl.load(q_ptrs, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
    qr_block = q_block
    if ROPE:
        offs_dr = tl.arange(0, BLOCK_DR)
        qr_ptrs = q_rope + row[:, None] * stride_qrt + q_head[:, None] * stride_qrh + offs_dr[None, :] * stride_qrd
        qr_block = tl.load(qr_ptrs, mask=valid[:, None] & (offs_dr < DR)[None, :], other=0.0)

    SUMS: tl.constexpr = BLOCK_N // 2 if SEGMENT else BLOCK_N
    m_i, l_i, acc = _nothing(BLOCK_M, SUMS, BLOCK_DV, ACC)
    m_all, l_all, acc_all = m_i, tl.zeros((BLOCK_M,), ACC), acc
    first_query = m0 // GROUP
    last_query = (m0 + BLOCK_M - 1) // GROUP
    begin = tl.maximum(S - L + first_query - left, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(S, S - L + last_query + right + 1)
    end = tl.where(m0 < L * GROUP, end, 0)
    if SPLIT:
        first = _first_key(part, SEGMENT)
        begin = tl.maximum(begin, first)
        end = tl.minimum(end, first + _segment(first, SEGMENT))
    # blocks of which every query of the tile sees every key
    whole = begin
    whole_end = begin
    if SEGMENT:
        whole = tl.minimum(
            tl.maximum(begin, tl.cdiv(S - L + last_query - left, BLOCK_N) * BLOCK_N), tl.maximum(end, begin)
        )
        whole_end = tl.maximum(tl.minimum(end, S - L + first_query + right + 1) // BLOCK_N * BLOCK_N, whole)
    pages = table
    if KEYS > 0:
        pages += request.to(tl.int64) * stride_table
    if SEGMENT:
        # read a block ahead: what is read where it is needed would have the copies of keys on their way waited for
        next_block = _page_of(pages, begin, S, PAGE, KEYS, True, BLOCK_N)
    if SEGMENT > 0 and (not SPLIT and BLOCK_M >= 64):
        # a loop for each segment, as in `attention._attention`
        first_n = begin
        while first_n < end:
            next_n = tl.minimum(_behind(first_n, SEGMENT), end)
            next_whole = tl.minimum(tl.maximum(whole, first_n), next_n)
            next_whole_end = tl.minimum(tl.maximum(whole_end, next_whole), next_n)
            m_i, l_i, acc = _nothing(BLOCK_M, SUMS, BLOCK_DV, ACC)
            for STAGE in tl.static_range(0 if WINDOW else 1, 3):
                begin_n = first_n if STAGE == 0 else next_whole if STAGE == 1 else next_whole_end
                end_n = next_whole if STAGE == 0 else next_whole_end if STAGE == 1 else next_n
                if STAGE == 1 or begin_n < end_n:  # a loop has its first loads, though it may be empty
                    for start_n in range(begin_n, end_n, BLOCK_N):
                        block = next_block
                        next_block = _page_of(pages, start_n + BLOCK_N, S, PAGE, KEYS, True, BLOCK_N)
                        qk, seen, any_seen, v_ptrs, inside = _block(
                            q_block, qr_block, k, v, k_rope, block, start_n, S, first_key, off_h, position, last_key, D, DV, DR, left, right,
                            stride_kp, stride_kn, stride_kh, stride_kd, stride_vp, stride_vn, stride_vh, stride_vd,
                            stride_krp, stride_krn, stride_krh, stride_krd, SCALE, KEYS, PAGE, ROPE, ACC, SEGMENT, STAGE == 1, WINDOW,
                            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_DR,
                        )  # fmt: skip
                        m_i, l_i, acc = _add_block(
                            qk, seen, any_seen, v_ptrs, inside, offs_dv < DV, m_i, l_i, acc, 0 if STAGE == 1 else 2, EXP, SEGMENT
                        )  # fmt: skip
            m_all, l_all, acc_all = _join(m_all, l_all, acc_all, m_i, _total(l_i, FOLD), acc, EXP)
            first_n = next_n
        m_i, l_row, acc = m_all, l_all, acc_all
    else:
        for STAGE in tl.static_range(2 if not SEGMENT else 0 if WINDOW else 1, 3):
            for start_n in range(
                begin if STAGE == 0 else whole if STAGE == 1 else whole_end,
                whole if STAGE == 0 else whole_end if STAGE == 1 else end,
                BLOCK_N,
            ):
                if SEGMENT:
                    block = next_block
                    next_block = _page_of(pages, start_n + BLOCK_N, S, PAGE, KEYS, True, BLOCK_N)
                else:
                    block = _page_of(pages, start_n, S, PAGE, KEYS, False, BLOCK_N)
                qk, seen, any_seen, v_ptrs, inside = _block(
                    q_block, qr_block, k, v, k_rope, block, start_n, S, first_key, off_h, position, last_key, D, DV, DR, left, right,
                    stride_kp, stride_kn, stride_kh, stride_kd, stride_vp, stride_vn, stride_vh, stride_vd,
                    stride_krp, stride_krn, stride_krh, stride_krd, SCALE, KEYS, PAGE, ROPE, ACC, SEGMENT, STAGE == 1, WINDOW,
                    BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_DR,
                )  # fmt: skip
                m_i, l_i, acc, m_all, l_all, acc_all = _add_next(
                    qk, seen, any_seen, v_ptrs, inside, offs_dv < DV, start_n, end, m_i, l_i, acc, m_all, l_all, acc_all,
                    0 if STAGE == 1 else 2, EXP, SEGMENT, SEGMENT > 0 and not SPLIT,
                )  # fmt: skip
        l_row = _total(l_i, FOLD)
        if SEGMENT > 0 and not SPLIT:
            m_i, l_row, acc = _join(m_all, l_all, acc_all, m_i, l_row, acc, EXP)

    heads = programs // tiles * group
    out_row = row * heads + q_head
    if SPLIT:
        _store_part(
            partial, m_i, l_row, acc, out_row, valid, offs_dv < DV, begin < end,
            part, parts, tokens * heads, DV,
        )  # fmt: skip
    else:
        acc, logsumexp = _finish(m_i, l_row, acc, EXP)
        tl.store(lse + out_row, logsumexp, mask=valid)
        if BLOCK_DV < 512:
            # tokens, heads of each, elements: what a division of rows hides from Ascend's compiler, which then stores single elements
            HEADS: tl.constexpr = GROUP if GROUP < BLOCK_M else BLOCK_M
            TOKENS: tl.constexpr = BLOCK_M // HEADS
            tokens_ahead = tl.arange(0, TOKENS)
            heads_ahead = tl.arange(0, HEADS)
            first_head = m0 % GROUP
            out_base = out + ((token + m0 // GROUP).to(tl.int64) * heads + off_h * group + first_head) * DV
            out_ptrs = (
                out_base
                + (tokens_ahead.to(tl.int64) * heads * DV)[:, None, None]
                + (heads_ahead.to(tl.int64) * DV)[None, :, None]
                + offs_dv[None, None, :]
            )
            there = (
                (tokens_ahead < L - m0 // GROUP)[:, None, None]
                & (heads_ahead < group - first_head)[None, :, None]
                & (offs_dv < DV)[None, None, :]
            )
            tl.store(out_ptrs, tl.reshape(acc.to(out.dtype.element_ty), (TOKENS, HEADS, BLOCK_DV)), mask=there)
        else:  # an Ascend 950 has no room for the output's tile twice
            wide_ptrs = out + out_row[:, None] * DV + offs_dv[None, :]
            tl.store(wide_ptrs, acc.to(out.dtype.element_ty), mask=valid[:, None] & (offs_dv < DV)[None, :])


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.paged_attention`; the order of the sums: `_paged_attention`."""
    asked = {"softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
    if any(x is not None for x in asked.values()):
        raise NotImplementedError(
            f"bi_compile::paged_attention on {query.device} has no {', '.join(n for n, x in asked.items() if x is not None)}: it is "
            "computed on a CPU alone"
        )
    outs = ops.paged_attention.meta(
        query,
        key,
        value,
        lengths,
        block_table,
        query_rope=query_rope,
        key_rope=key_rope,
        scale=scale,
        left=left,
        right=right,
    )
    return fill(
        outs, query, key, value, lengths[0], lengths[1], block_table,
        query_rope=query_rope, key_rope=key_rope, scale=scale, left=left, right=right,
    )  # fmt: skip


def fill(
    outs: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, ends: Tensor, counts: Tensor, block_table: Tensor | None,
    *, query_rope: Tensor | None = None, key_rope: Tensor | None = None, scale: float | None = None,
    left: int | None = None, right: int | None = None, longest: int | None = None, most: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `outs` (output, logsumexp), both contiguous. ends, counts [R]: the two rows of the operator's `lengths`. longest: no request
    has more queries; unknown unless given. most: no request has more keys; as many as the pages hold unless given."""
    tokens, q_heads, dim = query.shape
    requests, heads, value_dim = ends.shape[0], key.shape[-2], value.shape[-1]
    if outs[1].numel() == 0:
        return outs
    if requests == 0:
        return outs[0].zero_(), outs[1].fill_(-math.inf)
    group, device, size = q_heads // heads, target(query), query.element_size()
    blocks = blocks_of_head("paged_attention", query, dim, value_dim)
    padded = triton.next_power_of_2(group)
    page = 1 if block_table is None else key.shape[1]
    rope = 0 if query_rope is None else query_rope.shape[2]
    sums = _order(query)
    if most is None:
        most = key.shape[0] if block_table is None else block_table.shape[1] * page
    q_rope, k_rope = (query, key) if query_rope is None or key_rope is None else (query_rope, key_rope)
    k_strides, v_strides, kr_strides = (
        (0, *x.stride()) if block_table is None else x.stride() for x in (key, value, k_rope)
    )
    launches = launches_for(query, requests, heads, padded, max(blocks), longest)
    width = launches[0][1].width  # every tile's
    keys = PACKED if block_table is None else WHOLE_TILES if page % width == 0 else PAGES
    limit = LONGEST_HEAD_GATHERED.get(device, {}).get(size)
    if keys == PAGES and limit is not None and max(blocks) > limit:
        raise NotImplementedError(
            f"bi_compile::paged_attention: heads of {max(dim, value_dim)} in {query.dtype} in pages of {page} keys do not fit into an "
            f"Ascend NPU's on-chip memory, which holds {limit} there: use pages of a multiple of {width} keys (vLLM's block_size)"
        )
    alone = len(launches) == 1
    for which, tile in launches:
        tiles = requests
        if which != SHORT:
            tiles += tokens * padded // tile.height + 1
        elif alone:  # for the tokens behind the last request, which another launch would take
            tiles += cdiv(tokens * padded, tile.height)
        parts = parts_of(heads * tiles, most, max(blocks), sums["SEGMENT"]) if alone else 1
        partial = room_for(parts, outs)
        launch(
            _paged_attention, heads * tiles * parts, query,
            query, key, value, q_rope, k_rope, ends, counts, block_table, *outs, partial,
            tokens, requests, tiles, parts, group, dim, value_dim, rope,
            UNLIMITED if left is None else min(left, UNLIMITED), UNLIMITED if right is None else min(right, UNLIMITED),
            *query.stride(), *k_strides, *v_strides, *q_rope.stride(), *kr_strides,
            0 if block_table is None else block_table.stride(0),
            SCALE=scale_of(scale, dim + rope, sums["EXP"]), KEYS=keys, PAGE=page, ROPE=rope > 0, **sums, SPLIT=parts > 1, WINDOW=left is not None,
            WHICH=which, FEW_ROWS=_few_rows(), GROUP=padded, BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_D=blocks[0], BLOCK_DV=blocks[1],
            BLOCK_DR=blocks_of_head("paged_attention", query, rope, 1)[0], BLOCK_R=REQUESTS[device], num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        join_parts(partial, outs, parts, blocks[1], sums)
    return outs


def launches_for(
    query: Tensor, requests: int, heads: int, padded: int, head: int, longest: int | None
) -> list[tuple[int, Tile]]:
    """What is launched, as (whose queries, tile).

    Who is beside a request changes the tile, never a bit. A decode beside a prompt would take the prompt's tile, so a batch that may have
    both is launched twice; elsewhere than in 16 bits on CUDA, where one tile serves all rows, once, as for heads of more than 128 elements.
    """
    several = bool(_order(query)["SEGMENT"]) and head <= ATTENTION_HEAD["cuda"][1]  # tiles to choose from
    few = _few_rows()

    def tile_for(rows: int) -> Tile:
        tile = tile_of(query, rows, head)
        halved = several and tile.height == few and heads * requests > MANY
        return tile._replace(warps=tile.warps // 2) if halved else tile

    if longest is None or not several or padded > few:
        return [(ALL, tile_for(cdiv(query.shape[0], requests) * padded))]  # the average request's
    if longest * padded <= few:
        return [(SHORT, tile_for(few))]
    tall = tile_for(longest * padded)
    return [(ALL, tall)] if requests == 1 else [(LONG, tall), (SHORT, tile_for(few))]


def _few_rows() -> int:
    """The rows of the lowest tile in 16 bits on CUDA: what a request has that is SHORT, at most."""
    return ATTENTION["cuda"][2][0][1].height


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"paged_attention": paged_attention}
