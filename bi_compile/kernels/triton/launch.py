"""What the host functions share: strides, alignment and index types of their operands, and the launch itself."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import ROWS, Tile

#: a multiple of 16 lets Triton read in 16-byte words; other pointers and strides compile to another kernel with another layout
ALIGNMENT = 16
INT32_MAX = 2**31 - 1
#: options of a launch that Ascend's compiler does not know
GPU_OPTIONS = ("num_warps", "num_stages")
#: the tables' key for tensors of a CPU, which Triton's interpreter reads
HOST = "cuda"


def target(x: Tensor) -> str:
    """The key of x's device in `tiles`."""
    return HOST if x.device.type == "cpu" else x.device.type


def choose(table: list[tuple[int, Tile]], rows: int) -> Tile:
    """The first tile whose limit holds `rows`."""
    return next(tile for limit, tile in table if rows <= limit)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` takes microseconds, since it serves kernels too."""
    return -(-a // b)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's type in which sums of `dtype` are taken."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# ---- rows of C elements, for reductions and norms ----


def rows_meta(x: Tensor, length: int) -> dict[str, Any]:
    """Tile, accumulator and warps of a kernel over rows of `length` elements: a function of `length` and the dtype.

    WHOLE: a program keeps its rows, which fit into BLOCK_C, instead of reading them again. Not on Ascend, whose unified buffer is small.
    """
    name = target(x)
    height, width, warps = _row_tile(name, length)
    whole = name != "npu" and length <= width
    return {"WHOLE": whole, "BLOCK_R": height, "BLOCK_C": width, "ACC": accumulator(x.dtype), "num_warps": warps}


@functools.cache
def _row_tile(target: str, length: int) -> tuple[int, int, int]:
    widest, short, per_warp = ROWS[target]
    width = min(triton.next_power_of_2(length), widest)
    height = max(1, short // max(width, 16))
    return height, width, max(4, height * width // per_warp)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it if x's pointer is not aligned: Triton would compile another kernel, whose layout could sum in another order."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def as_rows(x: Tensor, length: int) -> Tensor:
    """x as [R, length], with a layout for which a kernel of this length is always compiled alike: last dimension contiguous.

    Rows with gaps between them stay a view if pointer, row stride and length are multiples of `ALIGNMENT`, as those of
    contiguous rows of that length are; otherwise x is copied.
    """
    x = aligned(x.reshape(-1, length))
    gaps_allowed = x.stride(0) % ALIGNMENT == 0 and length % ALIGNMENT == 0
    unit = x.stride(1) == 1 or length == 1
    return x if unit and (x.stride(0) == length or (gaps_allowed and length > 1)) else x.contiguous()


def as_head_rows(x: Tensor, length: int) -> tuple[Tensor, int, int, int]:
    """x as rows of `length` that a kernel finds by two strides: (x, rows in a group, stride of groups, stride of rows in a group).

    The heads of a query that is a slice of one product's output for query, key and value are such rows. They are read in place
    if pointer and strides are multiples of `ALIGNMENT`; everything else comes from `as_rows`, as groups of one row.
    """
    heads = x.dim() == 3 and x.shape[2] == length and x.shape[0] > 1 and x.shape[1] > 1 and target(x) != "npu"
    if heads and not x.is_contiguous() and x.stride(2) == 1 and length > 1 and length % ALIGNMENT == 0:
        stride_group, stride_row, _ = x.stride()
        if stride_group % ALIGNMENT == 0 and stride_row % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0:
            return x, x.shape[1], stride_group, stride_row
    rows = as_rows(x, length)
    return rows, 1, row_stride(rows), 0


def row_stride(x: Tensor) -> int:
    """Row stride of what `as_rows` returned. That of a single row is arbitrary and could compile another kernel."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


# ---- operands of products ----


def loads_transposed(x: Tensor) -> bool:
    """Whether the tiles of an operand [B, R, C] are loaded as [C, R] and transposed on the chip.

    On Ascend, for operands contiguous along R: the cube's loads take contiguous rows and transpose them on the way; other
    layouts would be gathered by the vector cores and written back first.
    """
    return target(x) == "npu" and x.stride(1) == 1 and x.stride(2) != 1


def extent(*tensors: Tensor | None) -> int:
    """The largest offset of an element in any of the tensors, in elements."""
    present = [t for t in tensors if t is not None]
    return max(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in present)


def index_type(*tensors: Tensor | None) -> Any:
    """Triton's integer type that holds every offset into the tensors."""
    return tl.int64 if extent(*tensors) > INT32_MAX else tl.int32


# ---- the launch ----


class Launched(NamedTuple):
    """One launch: the kernel, what was compiled for it, how many programs, its arguments and its constants."""

    kernel: Any
    compiled: Any
    programs: int
    args: tuple[Any, ...]
    meta: Mapping[str, Any]


_watched = threading.local()


@contextlib.contextmanager
def watching() -> Iterator[list[Launched]]:
    """A list of what this thread launches inside, but for what another one inside lists."""
    seen: list[Launched] = []
    before = getattr(_watched, "seen", None)
    _watched.seen = seen
    try:
        yield seen
    finally:
        _watched.seen = before


def launch(kernel: Any, programs: int, x: Tensor, *args: Any, **meta: Any) -> None:
    """Run `programs` programs of the kernel on x's device; none if there are none."""
    if programs == 0:
        return
    if target(x) == "npu":
        meta = {name: value for name, value in meta.items() if name not in GPU_OPTIONS}
    npu: Any = getattr(torch, "npu", None)  # torch_npu's
    guard = npu.device(x.device) if x.device.type == "npu" else torch.cuda.device_of(x)
    with guard:
        compiled = kernel[(programs,)](*args, **meta)
    if getattr(_watched, "seen", None) is not None:
        _watched.seen.append(Launched(kernel, compiled, programs, args, meta))
