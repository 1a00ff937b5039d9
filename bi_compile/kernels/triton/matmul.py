"""Products: one program for each tile of the output, which takes K in ascending order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from . import matmul_tma
from .launch import cdiv, choose, index_type, launch, loads_transposed, target
from .output_tile import GROUP_SIZE_M, program_tile, store_output
from .tiles import PRODUCT, PRODUCT_K, Tile


@triton.jit
def _operand_ptrs(x, offs_r, stride_r, offs_c, stride_c, TRANSPOSED: tl.constexpr):
    """Pointers to x's elements [offs_r, offs_c], or [offs_c, offs_r] if TRANSPOSED."""
    if TRANSPOSED:
        result = x + offs_c[:, None] * stride_c + offs_r[None, :] * stride_r
    else:
        result = x + offs_r[:, None] * stride_r + offs_c[None, :] * stride_c
    return result


@triton.jit
def _load_operand(ptrs, offs_r, end_r, offs_c, end_c, TRANSPOSED: tl.constexpr):
    """The elements [offs_r, offs_c] that `_operand_ptrs` points to, zeros from end_r and end_c on."""
    if TRANSPOSED:
        result = tl.trans(tl.load(ptrs, mask=(offs_c < end_c)[:, None] & (offs_r < end_r)[None, :], other=0.0))
    else:
        result = tl.load(ptrs, mask=(offs_r < end_r)[:, None] & (offs_c < end_c)[None, :], other=0.0)
    return result


@triton.jit
def _sum_over_k(
    a, b, offs_m, M, offs_n, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a[offs_m] @ b[:, offs_n], K in blocks of BLOCK_K, ascending, in one float32 accumulator per element.

    A block's products are added to the accumulator one after the other, of 16 bits as the matrix unit does it. Ragged blocks are filled with
    zeros. A_TRANSPOSED, B_TRANSPOSED: the operand's tile is loaded with its dimensions swapped, in the order
    in which memory has it, and transposed on the chip.
    """
    offs_k = tl.arange(0, BLOCK_K).to(INDEX)
    a_ptrs = _operand_ptrs(a, offs_m, stride_am, offs_k, stride_ak, A_TRANSPOSED)
    b_ptrs = _operand_ptrs(b, offs_k, stride_bk, offs_n, stride_bn, B_TRANSPOSED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a_block = _load_operand(a_ptrs, offs_m, M, offs_k, K - k0, A_TRANSPOSED)
        b_block = _load_operand(b_ptrs, offs_k, K - k0, offs_n, N, B_TRANSPOSED)
        acc = tl.dot(a_block, b_block, acc, input_precision="ieee")
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    return acc


@triton.jit
def product_tile(
    a, b, M, N, K, stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE_M: tl.constexpr,
):  # fmt: skip
    """Batch, rows and columns of this program's tile of a @ b, and its sums: `_sum_over_k`."""
    batch, m0, n0 = program_tile(M, N, BLOCK_M, BLOCK_N, GROUP_SIZE_M)
    offs_m = (m0 + tl.arange(0, BLOCK_M)).to(INDEX)
    offs_n = (n0 + tl.arange(0, BLOCK_N)).to(INDEX)
    acc = _sum_over_k(
        a + batch * stride_az, b + batch * stride_bz, offs_m, M, offs_n, N, K, stride_am, stride_ak, stride_bk, stride_bn,
        A_TRANSPOSED, B_TRANSPOSED, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    return batch, offs_m, offs_n, acc


@triton.jit(do_not_specialize=["M"])
def _product(
    a, b, bias, out, M, N, K,
    stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn, stride_biasz, stride_biasm, stride_biasn, alpha, beta,
    SCALED: tl.constexpr, BIASED: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE_M: tl.constexpr,
):  # fmt: skip
    """out = alpha * (a @ b) + beta * bias: `product_tile`, then `store_output`."""
    batch, offs_m, offs_n, acc = product_tile(
        a, b, M, N, K, stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn,
        A_TRANSPOSED, B_TRANSPOSED, INDEX, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_SIZE_M,
    )  # fmt: skip
    store_output(
        acc, bias, out, batch, offs_m, offs_n, M, N, stride_biasz, stride_biasm, stride_biasn, alpha, beta,
        SCALED, BIASED, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _group_tile(offs, groups, M, N, COUNTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Group, first row m0, end of the group's rows and first column n0 of this program's tile.

    The rows behind the last group are a group of their own, number `groups`. Programs beyond its last tile begin behind row M.
    """
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // num_pid_n
    group = pid_m * 0
    m0, end, start, tiles_before = group, group, group, group
    for g in range(0, groups):
        stop = tl.load(offs + g).to(tl.int32)
        if COUNTS:
            stop += start
        stop = tl.minimum(stop, M)
        tiles = tl.cdiv(stop - start, BLOCK_M)
        here = (pid_m >= tiles_before) & (pid_m < tiles_before + tiles)
        group = tl.where(here, g, group)
        m0 = tl.where(here, start + (pid_m - tiles_before) * BLOCK_M, m0)
        end = tl.where(here, stop, end)
        tiles_before += tiles
        start = stop
    behind = pid_m >= tiles_before
    group = tl.where(behind, groups, group)
    m0 = tl.where(behind, start + (pid_m - tiles_before) * BLOCK_M, m0)
    end = tl.where(behind, M, end)
    return group.to(tl.int64), m0, end, tl.program_id(0) % num_pid_n * BLOCK_N


@triton.jit(do_not_specialize=["groups", "M"])
def _grouped(
    a, b, bias, offs, out, groups, M, N, K,
    stride_am, stride_ak, stride_bz, stride_bk, stride_bn, stride_biasz, stride_biasn,
    COUNTS: tl.constexpr, BIASED: tl.constexpr, B_TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = a @ b[g] + bias[g] for the rows of each group g: `_sum_over_k`, then `store_output`; 0 behind the last group. A tile
    without rows or without a group reads nothing. offs: ends of the groups' rows, or (COUNTS) their numbers."""
    group, m0, end, n0 = _group_tile(offs, groups, M, N, COUNTS, BLOCK_M, BLOCK_N)
    real = (group < groups) & (m0 < end)
    offs_m = (m0 + tl.arange(0, BLOCK_M)).to(INDEX)
    offs_n = (n0 + tl.arange(0, BLOCK_N)).to(INDEX)
    acc = _sum_over_k(
        a, b + group * stride_bz, offs_m, end, offs_n, N, tl.where(real, K, 0), stride_am, stride_ak, stride_bk, stride_bn,
        False, B_TRANSPOSED, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIASED:
        addend = tl.load(
            bias + group * stride_biasz + offs_n * stride_biasn, mask=offs_n < tl.where(real, N, 0), other=0.0
        )
        acc = tl.fma(
            tl.broadcast_to(addend.to(tl.float32)[None, :], BLOCK_M, BLOCK_N),
            tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32),
            acc,
        )
    store_output(acc, bias, out, 0, offs_m, offs_n, end, N, 0, 0, 0, 1.0, 1.0, False, False, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def _product_float64(
    a, b, out, M, N, K, stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE_M: tl.constexpr,
):  # fmt: skip
    """out = a @ b in float64: K in blocks of BLOCK_K, ascending, each block's products added up one after the other."""
    batch, m0, n0 = program_tile(M, N, BLOCK_M, BLOCK_N, GROUP_SIZE_M)
    offs_m = (m0 + tl.arange(0, BLOCK_M)).to(INDEX)
    offs_n = (n0 + tl.arange(0, BLOCK_N)).to(INDEX)
    a_ptrs = a + batch * stride_az + offs_m[:, None] * stride_am
    b_ptrs = b + batch * stride_bz + offs_n[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    for k0 in range(0, K, BLOCK_K):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
        for _ in range(k0, tl.minimum(k0 + BLOCK_K, K)):
            x = tl.load(a_ptrs, mask=(offs_m < M)[:, None], other=0.0)
            y = tl.load(b_ptrs, mask=(offs_n < N)[None, :], other=0.0)
            part = tl.fma(tl.broadcast_to(x, BLOCK_M, BLOCK_N), tl.broadcast_to(y, BLOCK_M, BLOCK_N), part)
            a_ptrs += stride_ak
            b_ptrs += stride_bk
        acc += part
    out_ptrs = out + batch * M * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def _float64(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, beta: float, alpha: float, tile: Tile) -> None:
    """`out` in float64; the epilogue by PyTorch, element by element, since Triton passes a scalar as float32."""
    count, m, n = out.shape
    programs = count * cdiv(m, tile.height) * cdiv(n, tile.width)
    launch(
        _product_float64, programs, a, a, b, out, m, n, a.shape[2], *a.stride(), *b.stride(), INDEX=index_type(a, b, out),
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=PRODUCT_K[target(a)][8], GROUP_SIZE_M=GROUP_SIZE_M, num_warps=tile.warps,
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

    `out` has the operands' dtype, or float32. a, b and bias may have any strides; nothing is copied.
    K in blocks of `PRODUCT_K`, ascending: `_sum_over_k`, for float64 `_product_float64`.
    """
    count, m, n = out.shape
    size = a.element_size()
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
        SCALED=alpha != 1, BIASED=bias is not None,
        A_TRANSPOSED=loads_transposed(a), B_TRANSPOSED=loads_transposed(b), INDEX=index_type(a, b, bias, out),
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=PRODUCT_K[target(a)][size], GROUP_SIZE_M=GROUP_SIZE_M,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def matrix(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """`product` of single matrices, through tensor memory descriptors where these can read the operands: the same bits."""
    layout = matmul_tma.tma_layout(a, b)
    if layout is None:
        product(out[None], a[None], b[None], bias, beta, alpha)
    else:
        addend = None if bias is None or beta == 0 else bias.expand(out.shape)
        matmul_tma.product(out, a, b, addend, beta, alpha, layout)
    return out


def _batch(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """`product`; a batch of one is a single matrix."""
    if out.shape[0] != 1:
        return product(out, a, b, bias, beta, alpha)
    matrix(out[0], a[0], b[0], None if bias is None else bias.expand(out.shape)[0], beta, alpha)
    return out


def mm(a: Tensor, b: Tensor) -> Tensor:
    """See `bi_compile.ops.mm`; the order of the sum: `product`."""
    return matrix(ops.mm.meta(a, b), a, b)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """See `bi_compile.ops.addmm`; the order of the sum: `product`."""
    return matrix(ops.addmm.meta(bias, a, b), a, b, bias, beta, alpha)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """See `bi_compile.ops.bmm`; the order of the sum: `product`."""
    return _batch(ops.bmm.meta(a, b), a, b)


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """See `bi_compile.ops.baddbmm`; the order of the sum: `product`."""
    return _batch(ops.baddbmm.meta(bias, a, b), a, b, bias, beta, alpha)


def mm_segments(a: Tensor, b: Tensor, segments: int) -> Tensor:
    """See `bi_compile.ops.mm_segments`; each segment is an element of a batch, the order of its sum: `product`."""
    out = ops.mm_segments.meta(a, b, segments)
    parts, each = out.new_empty(segments, *out.shape), (segments, a.shape[1] // segments)
    product(parts, a.unflatten(1, each).transpose(0, 1), b.unflatten(0, each))
    return ops.in_pairs(parts)


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, *, counts: bool = False) -> Tensor:
    """See `bi_compile.ops.grouped_mm`; the order of the sum: `product`. The host does not read `offs`."""
    out = ops.grouped_mm.meta(a, b, offs, bias)
    m, n = out.shape
    if out.numel() == 0:
        return out
    if b.shape[0] == 0:
        return out.zero_()
    size = out.element_size()
    tile = choose(PRODUCT[target(a)][size], cdiv(m, b.shape[0]))
    # a group's rows begin anywhere, so each may leave a tile unfilled
    programs = (cdiv(m, tile.height) + b.shape[0]) * cdiv(n, tile.width)
    launch(
        _grouped, programs, a, a, b, bias, offs.contiguous(), out, b.shape[0], m, n, a.shape[1],
        *a.stride(), *b.stride(), *((0, 0) if bias is None else bias.stride()), COUNTS=counts,
        BIASED=bias is not None, B_TRANSPOSED=loads_transposed(b),
        INDEX=index_type(a, b, bias, out), BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=PRODUCT_K[target(a)][size],
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mm": mm,
    "addmm": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "mm_segments": mm_segments,
    "grouped_mm": grouped_mm,
}
