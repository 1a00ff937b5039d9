"""16-bit products on Hopper: tiles come through tensor memory descriptors, and a program works off several tiles.

The sum is that of `matmul.product`: the matrix unit takes K in ascending order, however much of it one step fetches and
whatever the tile, so each of `FEW` and `MANY` gives the bits of every other and those of the kernel without descriptors.
`tests/kernels/triton_suite.py` checks that for every entry.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matmul import GROUP, _finish
from .tiles import ALIGNMENT, INT32_MAX, Tile, cdiv, index_type, launch


class Step(NamedTuple):
    """A tile, the elements of K that a step fetches, and how fast the tile's multiplications are, relative to the fastest."""

    tile: Tile
    depth: int
    speed: float


#: (up to this many rows, step): memory decides, so there is a program for each tile, several to a multiprocessor. Timed at
#: the shapes of Qwen3-8B and 0.6B on an H100 (torch 2.11, Triton 3.6), weights not in the cache.
FEW = [
    (16, Step(Tile(16, 32, 4, 6), 128, 0)),
    (32, Step(Tile(32, 16, 4, 3), 256, 0)),
    (64, Step(Tile(64, 64, 4, 6), 128, 0)),
]
#: more rows: a program for each multiprocessor, and the step whose rounds of tiles take least. Speeds fitted to 32 timings
#: of Qwen3-8B's shapes there.
MANY = [
    Step(Tile(64, 64, 4, 4), 128, 0.52),
    Step(Tile(64, 128, 4, 4), 128, 0.78),
    Step(Tile(128, 128, 8, 4), 64, 0.89),
    Step(Tile(128, 256, 8, 3), 64, 1.0),
]
_ROUNDS = frozenset(step.tile for step in MANY)


@triton.jit(do_not_specialize=["M", "PROGRAMS"])
def _product_by_descriptor(
    a, b, bias, out, M, N, K, PROGRAMS, bias_row, bias_col, alpha, beta,
    SCALED: tl.constexpr, BIASED: tl.constexpr, B_BY_COLUMN: tl.constexpr, ROUNDS: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = alpha * (a @ b) + beta * bias, K ascending, in one float32 accumulator per element; epilogue: `_finish`.

    ROUNDS: there may be more tiles than programs.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for place in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=ROUNDS):
        first = place // (GROUP_M * tiles_n) * GROUP_M
        height = tl.minimum(tiles_m - first, GROUP_M)
        inside = place % (GROUP_M * tiles_n)
        row = (first + inside % height) * BLOCK_M
        col = inside // height * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            left = a.load([row, k])
            right = b.load([col, k]).T if B_BY_COLUMN else b.load([k, col])
            acc = tl.dot(left, right, acc)
        rows = (row + tl.arange(0, BLOCK_M)).to(INDEX)
        cols = (col + tl.arange(0, BLOCK_N)).to(INDEX)
        _finish(
            acc, bias, out, 0, rows, cols, M, N, 0, bias_row, bias_col, alpha, beta, SCALED, BIASED, BLOCK_M, BLOCK_N
        )


class Where(NamedTuple):
    """How far apart the rows of a product's operands lie, where descriptors can read both; b by its columns or its rows."""

    a: int
    b: int
    by_column: bool


def _apart(rows: int, length: int, row: int, unit: int) -> int | None:
    """The distance of 16-bit rows where a descriptor can read them: contiguous, a multiple of 16 bytes apart."""
    apart = row if rows > 1 else cdiv(length, ALIGNMENT) * ALIGNMENT
    return apart if (unit == 1 or length == 1) and apart >= length and apart * 2 % ALIGNMENT == 0 else None


@functools.cache
def _processors(device: torch.device) -> int:
    """How many multiprocessors the device has; 0 if it is no Hopper."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


def where(a: Tensor, b: Tensor) -> Where | None:
    """Whether `product` can read a [M, K] and b [K, N] where they lie, and how."""
    if a.device.type != "cuda" or a.element_size() != 2 or not _processors(a.device):
        return None
    if (a.data_ptr() | b.data_ptr()) % ALIGNMENT or not a.numel() or not b.numel():
        return None
    (m, k), n = a.shape, b.shape[1]
    left, right, by_column = _apart(m, k, *a.stride()), _apart(n, k, *b.stride()[::-1]), True
    if right is None:
        right, by_column = _apart(k, n, *b.stride()), False
    return None if left is None or right is None else Where(left, right, by_column)


@functools.lru_cache(4096)
def step_for(m: int, n: int, processors: int) -> Step:
    """The step for M rows and N columns; K has no part in the choice, nor the choice in the bits."""
    for limit, step in FEW:
        if m <= limit:
            return step

    def time(step: Step) -> float:
        tiles = cdiv(m, step.tile.height) * cdiv(n, step.tile.width)
        return cdiv(tiles, processors) * step.tile.height * step.tile.width / step.speed

    return min(MANY, key=time)


def product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    beta: float,
    alpha: float,
    at: Where,
    step: Step | None = None,
) -> None:
    """Fill `out` [M, N], contiguous, with alpha * (a @ b) + beta * bias; `at` is `where(a, b)`, bias is [M, N]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n = a.shape, b.shape[1]
    processors = _processors(a.device)
    tile, depth, _ = step or step_for(m, n, processors)
    shape, block = ([n, k], [tile.width, depth]) if at.by_column else ([k, n], [depth, tile.width])
    tiles = cdiv(m, tile.height) * cdiv(n, tile.width)
    rounds = tile in _ROUNDS
    programs = min(tiles, processors) if rounds else tiles
    launch(
        _product_by_descriptor, programs, a,
        TensorDescriptor(a, [m, k], [at.a, 1], [tile.height, depth]), TensorDescriptor(b, shape, [at.b, 1], block),
        bias, out, m, n, k, programs, *((0, 0) if bias is None else bias.stride()), float(alpha), float(beta),
        SCALED=alpha != 1, BIASED=bias is not None, B_BY_COLUMN=at.by_column, ROUNDS=rounds,
        INDEX=tl.int64 if m * n > INT32_MAX else index_type(bias, out),
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=depth, GROUP_M=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
