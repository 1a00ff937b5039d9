"""A row's bits are its own at every number of rows and in every place, with Ascend's tiles, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/ascend/sweep.py          # every number of rows from 1 to 257, some minutes
    TRITON_INTERPRET=1 python tests/ascend/sweep.py 1 17 33  # these

For each operator and dtype: the rows are computed one by one; then the first M of them together, in their order and in
reverse, and compared in every place. Prints how many differ, and the error against float64 beside PyTorch's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import interpreter
import triton_cases as cases

from bi_compile.kernels.triton import launch

launch.HOST = "npu"
interpreter.install()

torch.set_num_threads(1)  # the processes of `main` share the cores

MOST, LENGTH = 257, 65
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Run = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def attention(x: Tensor) -> tuple[Tensor, ...]:
    """x's rows as queries of 2 heads of 32 over 70 fixed keys."""
    keys, values = (cases.draw(1, 1, 70, 32, dtype=x.dtype, seed=seed, scale=0.5) for seed in (1, 2))
    query = x[:, :64].reshape(1, x.shape[0], 2, 32).transpose(1, 2)
    out, lse = cases.call("scaled_dot_product_attention", query, keys, values)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def grouped(x: Tensor) -> Tensor:
    """x's rows in groups, some of them empty, that share one matrix."""
    n = x.shape[0]
    ends = torch.tensor([0, n // 3, n // 3, n // 2, n], dtype=torch.int32)
    return cases.call("grouped_mm", x, cases.matrix(x).expand(5, -1, -1), ends)


CALLS: dict[str, Run] = {**cases.ROW_CALLS, "grouped_mm": grouped, "attention": attention}


def rows_that_differ(name: str, dtype: torch.dtype, numbers: Sequence[int]) -> tuple[int, int]:
    """(rows that differ, rows compared)."""
    run = CALLS[name]
    x = cases.draw(max(numbers), LENGTH, dtype=dtype)
    alone = [cases.outputs(run(row[None])) for row in x]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    differ = compared = 0
    for m in numbers:
        for order in (torch.arange(m), torch.arange(m).flip(0)):
            together = cases.outputs(run(x[order]))
            unlike = torch.zeros(m, dtype=torch.bool)
            for o, e in zip(together, expected, strict=True):
                unlike |= (cases.bits(o) != cases.bits(e[order])).reshape(m, -1).any(1)
            differ, compared = differ + int(unlike.sum()), compared + m
    return differ, compared


def errors() -> Iterator[tuple[str, torch.dtype, float, float]]:
    """(operator, dtype, our error against float64, PyTorch's): root mean squares, 256 rows of 129."""
    for name, dtype in ((n, d) for n in cases.THEIRS for d in cases.ROUNDED if d != torch.float64):
        x = cases.draw(256, 129, dtype=dtype)
        ours, theirs = cases.outputs(cases.ROW_CALLS[name](x))[0], cases.THEIRS[name](x)
        exact = cases.THEIRS[name](x.double())
        lost = [cases.root_mean_square(t.reshape(exact.shape).double() - exact) for t in (ours, theirs)]
        yield name, dtype, lost[0], lost[1]


def main(numbers: Sequence[int]) -> int:
    total = 0
    pairs = list(itertools.product(CALLS, DTYPES))
    with ProcessPoolExecutor() as pool:
        results = pool.map(rows_that_differ, *zip(*pairs, strict=True), itertools.repeat(numbers))
        for (name, dtype), (differ, compared) in zip(pairs, results, strict=True):
            total += differ
            print(f"{name:14} {dtype!s:15} {differ} of {compared} rows differ", flush=True)
    worse = 0
    for name, dtype, ours, theirs in errors():
        print(f"{name:14} {dtype!s:15} error {ours:.3e}, PyTorch's {theirs:.3e}")
        worse += ours > 1.1 * theirs
    print(f"in all {total} rows differ; {worse} operators lose more digits than PyTorch")
    return 1 if total or worse else 0


if __name__ == "__main__":
    sys.exit(main([int(n) for n in sys.argv[1:]] or range(1, MOST + 1)))
