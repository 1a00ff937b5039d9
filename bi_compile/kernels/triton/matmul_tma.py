"""16-bit products on Hopper: tiles are loaded through tensor memory (TMA) descriptors, and a program may compute several tiles.

The sum is that of `matmul.product`: the matrix unit takes K in ascending order, however much of it one step loads and
whatever the tile, so each step of `tiles.TMA_FEW_ROWS` and `tiles.TMA_MANY_ROWS` gives the bits of every other and those of
the kernel without descriptors. `tests/kernels/triton/test_matmul.py` checks that for every entry.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ALIGNMENT, INT32_MAX, cdiv, index_type, launch
from .output_tile import GROUP_SIZE_M, grouped_order, store_output
from .tiles import TMA_FEW_ROWS, TMA_MANY_ROWS, TmaStep

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    # triton-ascend 3.2 has none; it never comes to `product`, since `tma_layout` is None for every device but Hopper
    TensorDescriptor = None

_PERSISTENT = frozenset(step.tile for step in TMA_MANY_ROWS)


@triton.jit(do_not_specialize=["M", "PROGRAMS"])
def _product_by_descriptor(
    a_desc, b_desc, bias, out, M, N, K, PROGRAMS, stride_biasm, stride_biasn, alpha, beta,
    SCALED: tl.constexpr, BIASED: tl.constexpr, B_TRANSPOSED: tl.constexpr, PERSISTENT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE_M: tl.constexpr,
):  # fmt: skip
    """out = alpha * (a @ b) + beta * bias, K ascending, in one float32 accumulator per element, then `store_output`.

    PERSISTENT: there may be more tiles than programs. B_TRANSPOSED: b_desc describes b as [N, K].
    """
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    for tile_id in tl.range(tl.program_id(0), num_pid_m * num_pid_n, PROGRAMS, flatten=PERSISTENT):
        m0, n0 = grouped_order(tile_id, num_pid_m, num_pid_n, BLOCK_M, BLOCK_N, GROUP_SIZE_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            a_block = a_desc.load([m0, k0])
            b_block = b_desc.load([n0, k0]).T if B_TRANSPOSED else b_desc.load([k0, n0])
            acc = tl.dot(a_block, b_block, acc)
        offs_m = (m0 + tl.arange(0, BLOCK_M)).to(INDEX)
        offs_n = (n0 + tl.arange(0, BLOCK_N)).to(INDEX)
        store_output(
            acc, bias, out, 0, offs_m, offs_n, M, N, 0, stride_biasm, stride_biasn, alpha, beta,
            SCALED, BIASED, BLOCK_M, BLOCK_N,
        )  # fmt: skip


class TmaLayout(NamedTuple):
    """Row strides, in elements, by which descriptors read a product's operands: a as [M, K], b as [K, N] or transposed as [N, K]."""

    stride_a: int
    stride_b: int
    b_transposed: bool


def _descriptor_stride(rows: int, length: int, stride_row: int, stride_unit: int) -> int | None:
    """The row stride of a 16-bit matrix if a descriptor can read it: contiguous rows, a multiple of 16 bytes apart."""
    stride = stride_row if rows > 1 else cdiv(length, ALIGNMENT) * ALIGNMENT
    return stride if (stride_unit == 1 or length == 1) and stride >= length and stride * 2 % ALIGNMENT == 0 else None


@functools.cache
def _hopper_multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 0 if it is no Hopper."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


def tma_layout(a: Tensor, b: Tensor) -> TmaLayout | None:
    """How `product` can read a [M, K] and b [K, N] without a copy; None if it cannot."""
    if a.device.type != "cuda" or a.element_size() != 2 or not _hopper_multiprocessors(a.device):
        return None
    if (a.data_ptr() | b.data_ptr()) % ALIGNMENT or not a.numel() or not b.numel():
        return None
    (m, k), n = a.shape, b.shape[1]
    stride_a, stride_b, b_transposed = (
        _descriptor_stride(m, k, *a.stride()),
        _descriptor_stride(n, k, *b.stride()[::-1]),
        True,
    )
    if stride_b is None:
        stride_b, b_transposed = _descriptor_stride(k, n, *b.stride()), False
    return None if stride_a is None or stride_b is None else TmaLayout(stride_a, stride_b, b_transposed)


@functools.lru_cache(4096)
def step_for(m: int, n: int, processors: int) -> TmaStep:
    """The step for M rows and N columns; K has no part in the choice, nor the choice in the bits."""
    for limit, step in TMA_FEW_ROWS:
        if m <= limit:
            return step

    def time(step: TmaStep) -> float:
        tiles = cdiv(m, step.tile.height) * cdiv(n, step.tile.width)
        return cdiv(tiles, processors) * step.tile.height * step.tile.width / step.speed

    return min(TMA_MANY_ROWS, key=time)


def product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    beta: float,
    alpha: float,
    layout: TmaLayout,
    step: TmaStep | None = None,
) -> None:
    """Fill `out` [M, N], contiguous, with alpha * (a @ b) + beta * bias; `layout` is `tma_layout(a, b)`, bias is [M, N]."""
    (m, k), n = a.shape, b.shape[1]
    processors = _hopper_multiprocessors(a.device)
    tile, block_k, _ = step or step_for(m, n, processors)
    b_shape, b_block = ([n, k], [tile.width, block_k]) if layout.b_transposed else ([k, n], [block_k, tile.width])
    tiles = cdiv(m, tile.height) * cdiv(n, tile.width)
    persistent = tile in _PERSISTENT
    programs = min(tiles, processors) if persistent else tiles
    launch(
        _product_by_descriptor, programs, a,
        TensorDescriptor(a, [m, k], [layout.stride_a, 1], [tile.height, block_k]),
        TensorDescriptor(b, b_shape, [layout.stride_b, 1], b_block),
        bias, out, m, n, k, programs, *((0, 0) if bias is None else bias.stride()), float(alpha), float(beta),
        SCALED=alpha != 1, BIASED=bias is not None, B_TRANSPOSED=layout.b_transposed, PERSISTENT=persistent,
        INDEX=tl.int64 if m * n > INT32_MAX else index_type(bias, out),
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=block_k, GROUP_SIZE_M=GROUP_SIZE_M,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
