"""Products: one program for each tile of the output, which walks K in ascending order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from .tiles import PRODUCT, PRODUCT_K, Tile, cdiv, choose, index_type, launch, target, turned

#: tiles of one column of tiles that run side by side, so that they share their columns of b in the cache
GROUP = 8


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Batch, first row and first column of this program's tile. Programs go down GROUP_M tiles, then to the right."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    batch = tl.program_id(0) // (tiles_m * tiles_n)
    place = tl.program_id(0) % (tiles_m * tiles_n)
    first = place // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = place % (GROUP_M * tiles_n)
    return batch.to(tl.int64), (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def _finish(
    acc, bias, out, batch, rows, cols, M, N, bias_batch, bias_row, bias_col, alpha, beta,
    SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store fma(beta, bias, alpha * acc), rounded once to out's dtype."""
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if SCALED:
        acc = acc * alpha
    if BIASED:
        bias_tile = bias + batch * bias_batch + rows[:, None] * bias_row + cols[None, :] * bias_col
        addend = tl.load(bias_tile, mask=inside, other=0.0).to(tl.float32)
        # written out: a compiler that fuses the sum by itself may do so in one tile's kernel and not in another's
        acc = tl.fma(addend, tl.full((BLOCK_M, BLOCK_N), beta, tl.float32), acc)
    out_tile = out + batch * M * N + rows[:, None] * N + cols[None, :]
    tl.store(out_tile, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(x, rows, row, cols, col, TURNED: tl.constexpr):
    """Pointers to x's elements [rows, cols], or [cols, rows] if TURNED."""
    if TURNED:
        result = x + cols[:, None] * col + rows[None, :] * row
    else:
        result = x + rows[:, None] * row + cols[None, :] * col
    return result


@triton.jit
def _load(tile, rows, row_end, cols, col_end, TURNED: tl.constexpr):
    """The elements [rows, cols] that `_tile` points to, zeros behind the ends."""
    if TURNED:
        result = tl.trans(tl.load(tile, mask=(cols < col_end)[:, None] & (rows < row_end)[None, :], other=0.0))
    else:
        result = tl.load(tile, mask=(rows < row_end)[:, None] & (cols < col_end)[None, :], other=0.0)
    return result


@triton.jit
def _sum(
    a, b, rows, row_end, cols, col_end, K, a_row, a_col, b_row, b_col,
    CHAINED: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a[rows] @ b[:, cols], K in blocks of BLOCK_K, ascending, in one float32 accumulator per element.

    If CHAINED, a block's products are added to the accumulator one after the other (or as the matrix unit does it); if
    not, to a sum of their own, which is then added to the accumulator: less error, as float32 needs it. Ragged blocks
    are filled with zeros. A_TURNED, B_TURNED: the operand's tile is read transposed, as it lies, and turned on the chip.
    """
    ks = tl.arange(0, BLOCK_K).to(INDEX)
    a_tile = _tile(a, rows, a_row, ks, a_col, A_TURNED)
    b_tile = _tile(b, ks, b_row, cols, b_col, B_TURNED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = _load(a_tile, rows, row_end, ks, K - k, A_TURNED)
        right = _load(b_tile, ks, K - k, cols, col_end, B_TURNED)
        if CHAINED:
            acc = tl.dot(left, right, acc, input_precision="ieee")
        else:
            part = tl.dot(left, right, input_precision="ieee")
            # not acc + part: the compiler turns that into the chain
            acc = tl.fma(part, tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32), acc)
        a_tile += BLOCK_K * a_col
        b_tile += BLOCK_K * b_row
    return acc


@triton.jit(do_not_specialize=["M"])
def _product(
    a, b, bias, out, M, N, K,
    a_batch, a_row, a_col, b_batch, b_row, b_col, bias_batch, bias_row, bias_col, alpha, beta,
    SCALED: tl.constexpr, BIASED: tl.constexpr, CHAINED: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = alpha * (a @ b) + beta * bias: `_sum`, `_finish`."""
    batch, row, col = _place(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (row + tl.arange(0, BLOCK_M)).to(INDEX)
    cols = (col + tl.arange(0, BLOCK_N)).to(INDEX)
    acc = _sum(
        a + batch * a_batch, b + batch * b_batch, rows, M, cols, N, K, a_row, a_col, b_row, b_col,
        CHAINED, A_TURNED, B_TURNED, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _finish(
        acc, bias, out, batch, rows, cols, M, N, bias_batch, bias_row, bias_col, alpha, beta, SCALED, BIASED, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit
def _place_in_group(ends, groups, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Group, first row, end of the group's rows and first column of this program's tile; no rows if there is no such tile."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    place = tl.program_id(0) // tiles_n
    group = place * 0
    row, end, start, seen = group, group, group, group
    for g in range(0, groups):
        stop = tl.load(ends + g)
        tiles = tl.cdiv(stop - start, BLOCK_M)
        here = (place >= seen) & (place < seen + tiles)
        group = tl.where(here, g, group)
        row = tl.where(here, start + (place - seen) * BLOCK_M, row)
        end = tl.where(here, stop, end)
        seen += tiles
        start = stop
    return group.to(tl.int64), row, end, tl.program_id(0) % tiles_n * BLOCK_N


@triton.jit(do_not_specialize=["groups"])
def _grouped(
    a, b, bias, ends, out, groups, N, K, a_row, a_col, b_group, b_row, b_col, bias_group, bias_row, bias_col,
    BIASED: tl.constexpr, CHAINED: tl.constexpr, B_TURNED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = a @ b[g] + bias[g] for the rows of each group g: `_sum`, `_finish`. Nothing is read where a group has no rows."""
    group, row, end, col = _place_in_group(ends, groups, N, BLOCK_M, BLOCK_N)
    rows = (row + tl.arange(0, BLOCK_M)).to(INDEX)
    cols = (col + tl.arange(0, BLOCK_N)).to(INDEX)
    acc = _sum(
        a, b + group * b_group, rows, end, cols, N, tl.where(row < end, K, 0), a_row, a_col, b_row, b_col,
        CHAINED, False, B_TURNED, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIASED:
        bias += group * bias_group
    _finish(acc, bias, out, 0, rows, cols, end, N, 0, bias_row, bias_col, 1.0, 1.0, False, BIASED, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def _product64(
    a, b, out, M, N, K, a_batch, a_row, a_col, b_batch, b_row, b_col,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = a @ b in float64: K in blocks of BLOCK_K, ascending, each block's products added up one after the other."""
    batch, row, col = _place(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (row + tl.arange(0, BLOCK_M)).to(INDEX)
    cols = (col + tl.arange(0, BLOCK_N)).to(INDEX)
    left = a + batch * a_batch + rows[:, None] * a_row
    right = b + batch * b_batch + cols[None, :] * b_col
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    for start in range(0, K, BLOCK_K):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
        for _ in range(start, tl.minimum(start + BLOCK_K, K)):
            x = tl.load(left, mask=(rows < M)[:, None], other=0.0)
            y = tl.load(right, mask=(cols < N)[None, :], other=0.0)
            part = tl.fma(tl.broadcast_to(x, BLOCK_M, BLOCK_N), tl.broadcast_to(y, BLOCK_M, BLOCK_N), part)
            left += a_col
            right += b_row
        acc += part
    out_tile = out + batch * M * N + rows[:, None] * N + cols[None, :]
    tl.store(out_tile, acc, mask=(rows < M)[:, None] & (cols < N)[None, :])


def _float64(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, beta: float, alpha: float, tile: Tile) -> None:
    """`out` in float64; the epilogue by PyTorch, element by element, since Triton passes a scalar as float32."""
    count, m, n = out.shape
    programs = count * cdiv(m, tile.height) * cdiv(n, tile.width)
    launch(
        _product64, programs, a, a, b, out, m, n, a.shape[2], *a.stride(), *b.stride(), INDEX=index_type(a, b, out),
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=PRODUCT_K[target(a)][8], GROUP_M=GROUP, num_warps=tile.warps,
    )  # fmt: skip
    if alpha != 1:
        out.mul_(alpha)
    if bias is not None:
        out.add_(bias, alpha=beta)


def product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
    tile: Tile | None = None,
) -> Tensor:
    """Fill `out` [B, M, N], contiguous, with alpha * (a @ b) + beta * bias; `tile` in place of the chosen one.

    a, b and bias may have any strides; nothing is copied.
    K in blocks of `PRODUCT_K`, ascending: `_sum`, for float64 `_product64`.
    """
    count, m, n = out.shape
    size = out.element_size()
    if out.numel() == 0:
        return out
    if bias is not None:
        bias = None if beta == 0 else bias.expand(out.shape)
    tile = tile or choose(PRODUCT[target(a)][size], m)
    if size == 8:
        _float64(out, a, b, bias, beta, alpha, tile)
        return out
    programs = count * cdiv(m, tile.height) * cdiv(n, tile.width)
    launch(
        _product, programs, a, a, b, bias, out, m, n, a.shape[2],
        *a.stride(), *b.stride(), *((0, 0, 0) if bias is None else bias.stride()), float(alpha), float(beta),
        SCALED=alpha != 1, BIASED=bias is not None, CHAINED=size == 2 or target(a) == "npu",
        A_TURNED=turned(a), B_TURNED=turned(b), INDEX=index_type(a, b, bias, out),
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=PRODUCT_K[target(a)][size], GROUP_M=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _matrix(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """`product` of single matrices, through descriptors where they can read them: the same bits."""
    from . import matmul_tma as hopper  # it shares the epilogue

    at = hopper.where(a, b)
    if at is None:
        product(out[None], a[None], b[None], bias, beta, alpha)
    else:
        addend = None if bias is None or beta == 0 else bias.expand(out.shape)
        hopper.product(out, a, b, addend, beta, alpha, at)
    return out


def _batch(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """`product`; a batch of one is a single matrix."""
    if out.shape[0] != 1:
        return product(out, a, b, bias, beta, alpha)
    _matrix(out[0], a[0], b[0], None if bias is None else bias.expand(out.shape)[0], beta, alpha)
    return out


def mm(a: Tensor, b: Tensor) -> Tensor:
    """See `bi_compile.ops.mm`; the order of the sum: `product`."""
    return _matrix(ops.mm.__wrapped__(a, b), a, b)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """See `bi_compile.ops.addmm`; the order of the sum: `product`."""
    return _matrix(ops.addmm.__wrapped__(bias, a, b), a, b, bias, beta, alpha)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """See `bi_compile.ops.bmm`; the order of the sum: `product`."""
    return _batch(ops.bmm.__wrapped__(a, b), a, b)


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """See `bi_compile.ops.baddbmm`; the order of the sum: `product`."""
    return _batch(ops.baddbmm.__wrapped__(bias, a, b), a, b, bias, beta, alpha)


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `bi_compile.ops.grouped_mm`; the order of the sum: `product`. The host does not read `offs`."""
    out = ops.grouped_mm.__wrapped__(a, b, offs, bias).zero_()
    m, n = out.shape
    if out.numel() == 0 or b.shape[0] == 0:
        return out
    size = out.element_size()
    tile = choose(PRODUCT[target(a)][size], cdiv(m, b.shape[0]))
    # a group's rows begin anywhere, so each may leave a tile unfilled
    programs = (cdiv(m, tile.height) + b.shape[0]) * cdiv(n, tile.width)
    bias = None if bias is None else bias.unsqueeze(1).expand(-1, m, -1)
    launch(
        _grouped, programs, a, a, b, bias, offs.to(torch.int32), out, b.shape[0], n, a.shape[1],
        *a.stride(), *b.stride(), *((0, 0, 0) if bias is None else bias.stride()),
        BIASED=bias is not None, CHAINED=size == 2 or target(a) == "npu", B_TURNED=turned(b),
        INDEX=index_type(a, b, bias, out), BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=PRODUCT_K[target(a)][size],
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mm": mm,
    "addmm": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "grouped_mm": grouped_mm,
}
