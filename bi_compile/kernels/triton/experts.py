"""The sum over a token's experts, where their products lie in the order of its choice."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch

COLUMNS = 1024
"""Columns that one program adds up."""


@triton.jit
def _sum_experts(x, out, H, blocks, K: tl.constexpr, BLOCK_H: tl.constexpr):
    """Each token's K rows of x [tokens, K, H] added up in ascending order from 0, in float32."""
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for i in tl.static_range(0, K):
        total += tl.load(x + (token * K + i) * H + cols, mask=cols < H, other=0.0).to(tl.float32)
    tl.store(out + token * H + cols, total.to(out.dtype.element_ty), mask=cols < H)


def sum_experts(x: Tensor, out: Tensor) -> None:
    """out [N, H] = the sum of x [N, k, H] over k, both contiguous and of up to 32 bits; the order of the sum: `_sum_experts`."""
    tokens, k, length = x.shape
    width = min(triton.next_power_of_2(length), COLUMNS)
    blocks = cdiv(length, width)
    launch(_sum_experts, tokens * blocks, x, x, out, length, blocks, K=k, BLOCK_H=width, num_warps=4)
