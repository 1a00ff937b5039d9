"""The shapes of the tiles for each target, and what every host function shares.

What may follow the number of rows at run time is the height and width of a product's or an attention tile: their bits
do not depend on it, which `tests/kernels/triton_suite.py` checks for every entry of these tables. Everything else here
follows the reduced length and the dtype alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: a pointer that Triton may read in 16-byte words; other pointers compile to another kernel with another layout
ALIGNMENT = 16
INT32_MAX = 2**31 - 1
#: options of a launch that Ascend's compiler does not know
GPU_OPTIONS = ("num_warps", "num_stages")


class Tile(NamedTuple):
    """A tile of `height` rows and `width` columns, and the `warps` and pipeline `stages` that work on it."""

    height: int
    width: int
    warps: int
    stages: int


#: products on Ascend: (up to this many rows, tile). A block of K of either operand fills at most half of L0A and L0B
#: (64 KB each, two buffers) at every height, so the cube takes it whole in each of these tiles. Narrow tiles for few rows:
#: 4096 columns are 64 tiles for the 24 cube cores.
NPU_PRODUCT = [
    (16, Tile(16, 64, 1, 1)),
    (32, Tile(32, 64, 1, 1)),
    (64, Tile(64, 128, 1, 1)),
    (INT32_MAX, Tile(128, 128, 1, 1)),
]
#: target -> bytes per element -> (up to this many rows, tile), ascending. 16-bit products run on the matrix units. In
#: 32 and 64 bits the products are fused multiply-adds in the vector units.
PRODUCT: dict[str, dict[int, list[tuple[int, Tile]]]] = {
    "cuda": {
        2: [
            (16, Tile(16, 32, 4, 6)),
            (32, Tile(32, 32, 4, 6)),
            (128, Tile(64, 32, 4, 6)),
            (256, Tile(64, 64, 4, 5)),
            (512, Tile(128, 128, 8, 4)),
            (INT32_MAX, Tile(256, 128, 8, 3)),
        ],
        4: [(16, Tile(16, 64, 4, 3)), (INT32_MAX, Tile(64, 64, 4, 3))],
        8: [(INT32_MAX, Tile(32, 32, 4, 1))],
    },
    "npu": {2: NPU_PRODUCT, 4: NPU_PRODUCT},
}
#: target -> bytes per element -> how many elements of K one step takes: part of the sum's order, never follows the rows
PRODUCT_K: dict[str, dict[int, int]] = {"cuda": {2: 64, 4: 32, 8: 32}, "npu": {2: 128, 4: 64}}

#: target -> bytes per element -> (up to this many rows, tile) of attention; rows are the queries of all heads that
#: share a key head. The width is the number of keys that one step takes and must not follow the rows. In 16 bits no tile of
#: 64 rows, which the warp group's matrix instruction would take: it is slower at each of the shapes that were timed on an
#: H100 (heads of 128; decoding over 512 and 4096 keys, 2048 queries at once), and at other heads its bits differed.
ATTENTION: dict[str, dict[int, list[tuple[int, Tile]]]] = {
    "cuda": {
        2: [(16, Tile(16, 64, 4, 3)), (INT32_MAX, Tile(32, 64, 4, 3))],
        4: [(16, Tile(16, 32, 4, 1)), (INT32_MAX, Tile(32, 32, 4, 1))],
        8: [(INT32_MAX, Tile(4, 16, 4, 1))],
    },
    "npu": {2: [(INT32_MAX, Tile(32, 64, 1, 1))], 4: [(INT32_MAX, Tile(32, 64, 1, 1))]},
}

#: target -> the shortest length that a head is filled up to; the longest that attention's tile has room for at its full height
ATTENTION_HEAD: dict[str, tuple[int, int]] = {"cuda": (16, 256), "npu": (32, 128)}
#: target -> bytes per element -> the longest head that has room at all; longer ones are refused
LONGEST_HEAD: dict[str, dict[int, int]] = {"npu": {2: 512, 4: 256}}

#: target -> (columns one program holds at once, elements of a tile of short rows, elements for each warp)
ROWS: dict[str, tuple[int, int, int]] = {"cuda": (8192, 1024, 512), "npu": (4096, 4096, 4096)}
#: target -> rows that one program of cumsum walks along
SCAN_ROWS: dict[str, int] = {"cuda": 32, "npu": 32}


#: the table's key for tensors of a CPU, which Triton's interpreter reads
HOST = "cuda"


def target(x: Tensor) -> str:
    """The tables' key for x's device."""
    return HOST if x.device.type == "cpu" else x.device.type


def turned(x: Tensor) -> bool:
    """Whether an operand [B, R, C] is read as [C, R]: on Ascend, where the cube's loads take rows as they lie in memory
    and turn them on the way, and columns would be gathered by the vector cores and written back first."""
    return target(x) == "npu" and x.stride(1) == 1 and x.stride(2) != 1


def folds(x: Tensor) -> bool:
    """Whether a sum over lanes is `reduce.fold`. Not on Ascend, where one tile, so one compiled order, serves all rows
    and the fold's many small dimensions overflow the unified buffer."""
    return target(x) != "npu"


def choose(table: list[tuple[int, Tile]], rows: int) -> Tile:
    """The first tile whose limit holds `rows`."""
    return next(tile for limit, tile in table if rows <= limit)


def fitting(tile: Tile, head: int, widest_head: int) -> Tile:
    """The tile of attention, with fewer stages and rows where heads of `head` elements would overflow memory."""
    height = tile.height if head <= widest_head else min(tile.height, 16)
    warps = max(1, tile.warps * height // tile.height)
    return Tile(height, tile.width, warps, max(1, min(tile.stages, 512 // head)))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` takes microseconds, since it serves kernels too."""
    return -(-a // b)


def rows_meta(x: Tensor, length: int) -> dict[str, Any]:
    """Tile, accumulator and warps of a kernel over rows of `length` elements: a function of `length` and the dtype."""
    height, width, warps = _row_tile(target(x), length)
    return {"BLOCK_R": height, "BLOCK_C": width, "ACC": accumulator(x.dtype), "num_warps": warps}


@functools.cache
def _row_tile(target: str, length: int) -> tuple[int, int, int]:
    widest, short, per_warp = ROWS[target]
    width = min(triton.next_power_of_2(length), widest)
    height = max(1, short // max(width, 16))
    return height, width, max(4, height * width // per_warp)


def keeps(x: Tensor, length: int) -> bool:
    """Whether a program keeps its row instead of reading it again. Not on Ascend, where the unified buffer is short."""
    return target(x) != "npu" and length <= ROWS[target(x)][0]


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's type in which sums of `dtype` are taken."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def aligned(x: Tensor) -> Tensor:
    """x, or its copy if x begins where Triton would compile another kernel, whose layout could sum in another order."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def as_rows(x: Tensor, length: int) -> Tensor:
    """x as [R, length], its last dimension contiguous, its layout one that a kernel of this length always sees.

    A view of rows that lie apart is kept where pointer and distance are multiples of 16, as those of whole rows are;
    otherwise x is copied.
    """
    x = aligned(x.reshape(-1, length))
    apart = x.stride(0) % ALIGNMENT == 0 and length % ALIGNMENT == 0
    unit = x.stride(1) == 1 or length == 1
    return x if unit and (x.stride(0) == length or (apart and length > 1)) else x.contiguous()


def as_head_rows(x: Tensor, length: int) -> tuple[Tensor, int, int, int]:
    """x as rows of `length` that a kernel finds by two distances: (x, rows in a group, distance of groups, of rows in one).

    The heads of a query that lies between keys and values in one product's output are such rows. They are read where they
    lie if pointer and distances are multiples of 16, as in `as_rows`, whose rows are groups of one otherwise.
    """
    heads = x.dim() == 3 and x.shape[2] == length and x.shape[0] > 1 and x.shape[1] > 1 and target(x) != "npu"
    if heads and not x.is_contiguous() and x.stride(2) == 1 and length > 1 and length % ALIGNMENT == 0:
        group, row, _ = x.stride()
        if group % ALIGNMENT == 0 and row % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0:
            return x, x.shape[1], group, row
    rows = as_rows(x, length)
    return rows, 1, row_stride(rows), 0


def row_stride(x: Tensor) -> int:
    """Distance of the rows of `as_rows`. A lone row's is meaningless and could compile another kernel."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def extent(*tensors: Tensor | None) -> int:
    """How far the farthest element of any of the tensors lies from the first, in elements."""
    present = [t for t in tensors if t is not None]
    return max(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in present)


def index_type(*tensors: Tensor | None) -> Any:
    """Triton's integer type that holds every offset into the tensors."""
    return tl.int64 if extent(*tensors) > INT32_MAX else tl.int32


def launch(kernel: Any, programs: int, x: Tensor, *args: Any, **meta: Any) -> None:
    """Run `programs` programs of the kernel on x's device; none if there are none."""
    if programs == 0:
        return
    if target(x) == "npu":
        meta = {name: value for name, value in meta.items() if name not in GPU_OPTIONS}
    guard = torch.npu.device(x.device) if x.device.type == "npu" else torch.cuda.device_of(x)
    with guard:
        kernel[(programs,)](*args, **meta)
