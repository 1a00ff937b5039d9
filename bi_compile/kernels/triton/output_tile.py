"""The output tile of a product: which tile a program computes, and how its sums become the output."""

from __future__ import annotations

import triton
import triton.language as tl

#: consecutive programs compute this many tiles below each other before the next column of tiles: they share b in the L2 cache
GROUP_SIZE_M = 8


@triton.jit
def grouped_order(
    tile_id, num_pid_m, num_pid_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_SIZE_M: tl.constexpr
):
    """First row m0 and first column n0 of a tile: GROUP_SIZE_M tiles below each other, then those to their right."""
    num_pid_in_group = GROUP_SIZE_M * num_pid_n
    first_pid_m = tile_id // num_pid_in_group * GROUP_SIZE_M
    group_size_m = tl.minimum(num_pid_m - first_pid_m, GROUP_SIZE_M)
    pid_in_group = tile_id % num_pid_in_group
    return (first_pid_m + pid_in_group % group_size_m) * BLOCK_M, pid_in_group // group_size_m * BLOCK_N


@triton.jit
def program_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_SIZE_M: tl.constexpr):
    """Batch, first row m0 and first column n0 of this program's tile, one program for each tile of each batch."""
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    batch = tl.program_id(0) // (num_pid_m * num_pid_n)
    tile_id = tl.program_id(0) % (num_pid_m * num_pid_n)
    m0, n0 = grouped_order(tile_id, num_pid_m, num_pid_n, BLOCK_M, BLOCK_N, GROUP_SIZE_M)
    return batch.to(tl.int64), m0, n0


@triton.jit
def store_output(
    acc, bias, out, batch, offs_m, offs_n, M, N, stride_biasz, stride_biasm, stride_biasn, alpha, beta,
    SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store fma(beta, bias, alpha * acc), rounded once to out's dtype, where offs_m < M and offs_n < N."""
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if SCALED:
        acc = acc * alpha
    if BIASED:
        bias_ptrs = bias + batch * stride_biasz + offs_m[:, None] * stride_biasm + offs_n[None, :] * stride_biasn
        addend = tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)
        # an explicit fma: left to the compiler, product and sum might be fused in one tile's kernel and not in another's
        acc = tl.fma(addend, tl.full((BLOCK_M, BLOCK_N), beta, tl.float32), acc)
    out_ptrs = out + batch * M * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=inside)
