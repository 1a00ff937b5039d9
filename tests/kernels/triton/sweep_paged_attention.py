"""Paged attention equal to the unpaged to the bit, over pages, lengths, positions and mixed batches; in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels/triton/sweep_paged_attention.py          # lengths 1 to 300, some 20 minutes of a core
    TRITON_INTERPRET=1 python tests/kernels/triton/sweep_paged_attention.py 64 65    # these

For each length: the request decodes, continues with a chunk and starts with its whole prompt (up to 40 tokens), in one batch, in two
orders. Three of the page sizes, a window or none, the query heads of a key head (1, 2, 3, 7 or 40) and the dtype go by turns. Prints how
many of the compared rows differ.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
import interpreter
import test_paged_attention as paged
import triton_cases as cases

from bi_compile.kernels.triton import launch

interpreter.install()

PAGES = (1, 8, 16, 24, 64, 100, 128, 192)
GROUPS = (1, 2, 3, 7, 40)
LIMITS = ({"left": None, "right": 0}, {"left": 70, "right": 0}, {"left": None, "right": None})


def rows_that_differ(keys: int) -> tuple[int, int]:
    """(rows that differ, rows compared) for requests of so many keys."""
    launch.HOST = "npu"
    torch.set_num_threads(1)
    differ = compared = 0
    paged.HEADS, paged.KV_HEADS = ((4, 2), *((n, 1) for n in GROUPS))[keys % (1 + len(GROUPS))]
    shapes = [(1, keys), (min(3, keys), keys), (min(40, keys), keys), (1, 1 + keys // 2)]
    requests = [paged.request_of(i, *n, (torch.float16, torch.float32)[keys // 7 % 2]) for i, n in enumerate(shapes)]
    limits = LIMITS[keys // 5 % len(LIMITS)]
    alone = [paged.alone(*r, **limits) for r in requests]
    sizes = [PAGES[(keys + 3 * i) % len(PAGES)] for i in range(3)]
    for size, order in zip(sizes, ([0, 1, 2, 3], [2, 3, 1, 0], [1, 0, 3, 2]), strict=True):
        found = paged.paged([requests[i] for i in order], size, **limits)
        parts = [x.split([shapes[i][0] for i in order]) for x in found]
        for place, i in enumerate(order):
            for part, want in zip(parts, alone[i], strict=True):
                unlike = cases.bits(part[place].contiguous()) != cases.bits(want)
                differ += int(unlike.reshape(shapes[i][0], -1).any(1).sum())
                compared += shapes[i][0]
    return differ, compared


def main(lengths: Sequence[int]) -> int:
    total = rows = 0
    with ProcessPoolExecutor() as pool:
        for keys, (differ, compared) in zip(lengths, pool.map(rows_that_differ, lengths), strict=True):
            total, rows = total + differ, rows + compared
            if differ:
                print(f"{keys} keys: {differ} of {compared} rows differ", flush=True)
    print(
        f"lengths {lengths[0]} to {lengths[-1]}, pages of {', '.join(map(str, PAGES))} keys: {total} of {rows} rows differ"
    )
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main([int(n) for n in sys.argv[1:]] or range(1, 301)))
