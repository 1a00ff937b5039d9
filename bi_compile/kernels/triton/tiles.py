"""The tiles of each kernel on each target: tables, no code.

What may follow the number of rows at run time is the height and width of a product's tile and the height of an attention
tile: the bits do not depend on them, which the tests in `tests/kernels/triton` check for every entry. Everything else here
follows the reduced length and the dtype alone.

The targets are "cuda" and "npu". A limit says up to how many rows a tile is taken; limits ascend.
"""

from __future__ import annotations

from typing import NamedTuple

#: the limit of the last tile in a table
UNLIMITED = 2**31 - 1


class Tile(NamedTuple):
    """A tile of `height` rows and `width` columns, and the `warps` and pipeline `stages` that work on it."""

    height: int
    width: int
    warps: int
    stages: int


#: products on Ascend: (limit, tile). A block of K of either operand fills at most half of L0A and L0B (64 KB each, two
#: buffers) at every height, so the cube takes it whole in each of these tiles. Narrow tiles for few rows: 4096 columns are
#: 64 tiles for the 24 cube cores.
NPU_PRODUCT = [
    (16, Tile(16, 64, 1, 1)),
    (32, Tile(32, 64, 1, 1)),
    (64, Tile(64, 128, 1, 1)),
    (UNLIMITED, Tile(128, 128, 1, 1)),
]
#: target -> bytes per element -> (limit, tile) of products. 16-bit products run on the matrix units. In 32 and 64 bits the
#: products are fused multiply-adds in the vector units.
PRODUCT: dict[str, dict[int, list[tuple[int, Tile]]]] = {
    "cuda": {
        2: [
            (16, Tile(16, 32, 4, 6)),
            (32, Tile(32, 32, 4, 6)),
            (128, Tile(64, 32, 4, 6)),
            (256, Tile(64, 64, 4, 5)),
            (512, Tile(128, 128, 8, 4)),
            (UNLIMITED, Tile(256, 128, 8, 3)),
        ],
        4: [(16, Tile(16, 64, 4, 3)), (UNLIMITED, Tile(64, 64, 4, 3))],
        8: [(UNLIMITED, Tile(32, 32, 4, 1))],
    },
    "npu": {2: NPU_PRODUCT, 4: NPU_PRODUCT},
}
#: target -> bytes per element -> elements of K in one step: part of the sum's order, so it never follows the rows
PRODUCT_K: dict[str, dict[int, int]] = {"cuda": {2: 64, 4: 32, 8: 32}, "npu": {2: 128, 4: 64}}


class TmaStep(NamedTuple):
    """A tile of a product that reads through tensor memory descriptors, the elements of K that one step loads, and how fast
    the tile's multiplications are, relative to the fastest."""

    tile: Tile
    block_k: int
    speed: float


#: (limit, step) for few rows: memory decides, so each tile has a program, several to a multiprocessor. Timed at the shapes
#: of Qwen3-8B and 0.6B on an H100 (torch 2.11, Triton 3.6), weights not in the cache.
TMA_FEW_ROWS = [
    (16, TmaStep(Tile(16, 32, 4, 6), 128, 0)),
    (32, TmaStep(Tile(32, 16, 4, 3), 256, 0)),
    (64, TmaStep(Tile(64, 64, 4, 6), 128, 0)),
]
#: more rows: a persistent program for each multiprocessor, and the step that needs the least time for all tiles. Speeds
#: fitted to 32 timings of Qwen3-8B's shapes there.
TMA_MANY_ROWS = [
    TmaStep(Tile(64, 64, 4, 4), 128, 0.52),
    TmaStep(Tile(64, 128, 4, 4), 128, 0.78),
    TmaStep(Tile(128, 128, 8, 4), 64, 0.89),
    TmaStep(Tile(128, 256, 8, 3), 64, 1.0),
]

#: target -> bytes per element -> (limit, tile) of attention; its rows are the queries of all heads that share a key head.
#: The width is the number of keys in one step and must not follow the rows. From 64 rows on 16-bit tiles run on the warp group's
#: matrix instruction; on an H200 its bits were those of the other tiles, and only Hopper takes them.
ATTENTION: dict[str, dict[int, list[tuple[int, Tile]]]] = {
    "cuda": {
        2: [
            (16, Tile(16, 64, 4, 3)),
            (32, Tile(32, 64, 4, 3)),
            (64, Tile(64, 64, 4, 3)),
            (UNLIMITED, Tile(128, 64, 8, 3)),
        ],
        4: [(16, Tile(16, 32, 4, 1)), (UNLIMITED, Tile(32, 32, 4, 1))],
        8: [(UNLIMITED, Tile(4, 16, 4, 1))],
    },
    "npu": {2: [(UNLIMITED, Tile(32, 64, 1, 1))], 4: [(UNLIMITED, Tile(32, 64, 1, 1))]},
}
#: attention in 16 bits on CUDA: keys of a segment (the first ones), part of the sum's order; up to how many programs times elements of
#: a head, which would leave the device idle, each segment has a program of its own
SEGMENT, FEW = 256, 96 * 128
#: how many segments of a row the kernel that joins them reads at a time
AHEAD = 16
#: paged attention in 16 bits on CUDA where each request has few rows: more programs than this, and each works with half the warps
MANY = 1024
#: target -> among how many requests a program of paged attention looks for its own at a time
REQUESTS: dict[str, int] = {"cuda": 128, "npu": 16}
#: attention in 16 bits on CUDA where heads have more than 128 elements: one tile for any number of rows
LONG_HEADS = Tile(16, 64, 4, 3)
#: target -> (the least length that a head is padded to, the greatest for which attention's tile keeps its full height)
ATTENTION_HEAD: dict[str, tuple[int, int]] = {"cuda": (16, 128), "npu": (32, 128)}
#: target -> bytes per element -> the longest head that on-chip memory has room for; longer ones are refused
LONGEST_HEAD: dict[str, dict[int, int]] = {"npu": {2: 512, 4: 256}}
#: the same for pages that hold no whole number of an attention tile's keys, which are gathered
LONGEST_HEAD_GATHERED: dict[str, dict[int, int]] = {"npu": {2: 128, 4: 64}}

#: target -> (columns that one program holds at once, elements of a tile of short rows, elements for each warp)
ROWS: dict[str, tuple[int, int, int]] = {"cuda": (8192, 1024, 512), "npu": (4096, 4096, 4096)}
#: the most warps that compute a cumsum: each waits for those before it
SCAN_WARPS = 8
#: rows for which one program computes the cumsum on Ascend
SCAN_ROWS = 32
