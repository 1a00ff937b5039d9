"""topk in C++ beside a stable sort, and the writes of keys and values to their pages."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import rand, same, threads
from torch import Tensor

from bi_compile import ops

SHAPES = [(0, 5), (3, 1), (4, 17), (7, 128), (2, 3, 64), (5, 1000), (33,)]


def by_sort(x: Tensor, k: int, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Zeros of both signs are equal, and so is any NaN to any other."""
    _, order = (x + 0.0).sort(dim=dim, descending=largest, stable=True)
    order = order.narrow(dim, 0, k)
    return x.gather(dim, order), order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_is_the_beginning_of_a_stable_sort(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (rand(*shape) * 3).round().to(dtype)
    if dtype.is_floating_point and x.numel() > 4:
        x.view(-1)[:5] = torch.tensor([float("nan"), -0.0, float("-inf"), float("inf"), 0.0])
    for dim in range(-x.dim(), x.dim()):
        n = x.shape[dim]
        for k in {0, min(1, n), min(2, n), n // 2, n}:
            for largest in (True, False):
                got = ops.topk(x, k, dim, largest)
                assert all(same(a, b) for a, b in zip(got, by_sort(x, k, dim, largest), strict=True)), (dim, k, largest)
                assert all(y.is_contiguous() for y in got)


def test_topk_takes_an_order_of_its_own_for_no_number_of_threads() -> None:
    x = (rand(16, 5003) * 9).round()
    with threads(1):
        alone = ops.topk(x, 40)
    with threads(2):
        assert all(same(a, b) for a, b in zip(ops.topk(x, 40), alone, strict=True))


def write(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    ops.load_kernels("cpu")
    torch.ops.bi_compile_cpu.write_pages_.default(cache, rows, slots)


@pytest.mark.parametrize("heads, width", [(1, 1), (2, 64), (8, 128)])
def test_rows_go_to_their_places_in_the_pages(heads: int, width: int) -> None:
    """The last of several for one place stays; -1 is nowhere; pages lie as vLLM lays them, heads first."""
    pages, size, n = 5, 16, 70
    slots = torch.randint(-1, pages * size, (n,), generator=torch.Generator().manual_seed(0))
    rows = rand(n, heads, width)
    want = torch.zeros(pages, size, heads, width, dtype=torch.bfloat16)
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            want[slot // size, slot % size] = row.bfloat16()
    for n_threads in (1, 2):
        with threads(n_threads):
            cache = torch.zeros(pages, heads, size, width, dtype=torch.bfloat16)
            write(cache.transpose(1, 2), rows, slots)
            assert same(cache.transpose(1, 2), want)
            write(cache.transpose(1, 2), rows.transpose(0, 1).contiguous().transpose(0, 1), slots.int())
            assert same(cache.transpose(1, 2), want)


def test_a_place_that_the_cache_does_not_have_is_refused() -> None:
    cache = torch.zeros(2, 4, 1, 8)
    with pytest.raises(IndexError, match="row 1 goes to slot 8, and the cache has 8"):
        write(cache, rand(2, 1, 8), torch.tensor([0, 8]))
    assert not cache.any()
    with pytest.raises(RuntimeError, match="rows \\[T, Hkv, D\\]"):
        write(cache, rand(2, 1, 9), torch.tensor([0, 1]))
