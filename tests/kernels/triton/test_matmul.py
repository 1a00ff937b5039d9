"""Products: right, in every layout, with the same bits in every tile of the tables and for every group."""

from __future__ import annotations

import math

import pytest
import torch
from triton_cases import (
    CUDA,
    DEVICE,
    FLOATS,
    ROUNDED,
    call,
    check,
    cuda,
    draw,
    no_worse,
    same,
    statistic,
)

from bi_compile.kernels.triton import matmul_tma
from bi_compile.kernels.triton.matmul import product
from bi_compile.kernels.triton.tiles import PRODUCT, TMA_FEW_ROWS, TMA_MANY_ROWS, Tile
from bi_compile.ops import in_pairs


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7, 127, 128, 1031, 12288] if CUDA else [0, 1, 65])
@pytest.mark.parametrize("rows", [0, 1, 5, 67] if CUDA else [0, 1, 35])
def test_products_are_right(rows: int, length: int, dtype: torch.dtype) -> None:
    for columns in (1, 40, 0):
        a, b = draw(rows, length, dtype=dtype), draw(columns, length, dtype=dtype, seed=1).t()
        bias = draw(columns, dtype=dtype, seed=2).expand(1, columns)
        check("mm", torch.mm, a, b)
        check("addmm", lambda c, x, y: torch.addmm(c, x, y, beta=0.3, alpha=1.7), bias, a, b, beta=0.3, alpha=1.7)
        batch = a.expand(3, -1, -1), draw(3, length, columns, dtype=dtype)
        check("bmm", torch.bmm, *batch)
        check("baddbmm", torch.baddbmm, draw(3, 1, columns, dtype=dtype), *batch)
        nan = torch.full_like(bias, math.nan)
        assert same(call("addmm", nan, a, b, beta=0), call("mm", a, b))
        assert same(call("bmm", *batch)[1], call("mm", batch[0][1], batch[1][1]))
        full = bias.expand(rows, columns).t().contiguous().t()
        assert same(call("addmm", full, a, b), call("addmm", bias, a, b))


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_segments_are_joined_in_pairs_however_many_processes_have_them(dtype: torch.dtype) -> None:
    for rows, length in [(5, 0), (35, 264), *([(67, 12288), (1, 1032)] if CUDA else [])]:
        a, w = draw(rows, length, dtype=dtype), draw(40, length, dtype=dtype, seed=1)
        want = call("mm_segments", a, w.t(), 4)
        assert want.dtype == statistic(a) and same(call("mm_segments", a[3:], w.t().contiguous(), 4), want[3:])
        room = 2e-5 * (a.double().abs() @ w.t().double().abs())
        assert ((want.double() - a.double() @ w.t().double()).abs() <= room).all()
        for ranks in (1, 2, 4):
            k = length // ranks
            parts = [slice(r * k, (r + 1) * k) for r in range(ranks)]
            sums = [call("mm_segments", a[:, p].contiguous(), w[:, p].contiguous().t(), 4 // ranks) for p in parts]
            assert same(in_pairs(torch.stack(sums)), want), ranks


#: where the groups of some rows end: none, one with all, empty ones, a last one that leaves rows over
ENDS = [(), (37,), (0, 5, 5, 21, 37), (1, 2, 3, 36, 37), (0, 16, 33)]


@pytest.mark.parametrize("dtype", [t for t in FLOATS if t != torch.float64], ids=str)
@pytest.mark.parametrize("length", [0, 65, 1000] if CUDA else [0, 65])
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_a_grouped_product_is_that_of_each_group(ends: tuple[int, ...], length: int, dtype: torch.dtype) -> None:
    x, w = draw(37, length, dtype=dtype), draw(len(ends), 40, length, dtype=dtype, seed=3).transpose(1, 2)
    bias = draw(len(ends), 40, dtype=dtype, seed=4)
    plain, biased = torch.zeros(2, 37, 40, dtype=dtype, device=DEVICE)
    for g, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        plain[start:end] = call("mm", x[start:end], w[g])
        biased[start:end] = call("addmm", bias[g], x[start:end], w[g])
    for offs in (torch.tensor(ends, dtype=t, device=DEVICE) for t in (torch.int32, torch.int64)):
        assert same(call("grouped_mm", x, w, offs), plain)
        assert same(call("grouped_mm", x, w.contiguous(), offs, bias), biased)
        assert same(call("grouped_mm", x.t().contiguous().t(), w, offs), plain)
        numbers = offs.diff(prepend=offs.new_zeros(1))
        assert same(call("grouped_mm", x, w, numbers, bias, counts=True), biased)
        assert same(call("grouped_mm", x, w.contiguous(), numbers.repeat_interleave(2)[::2], counts=True), plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [64, 65, 1000] if CUDA else [65])
def test_every_tile_of_a_product_gives_the_same_bits(length: int, dtype: torch.dtype) -> None:
    a, b = draw(1, 37, length, dtype=dtype), draw(1, 70, length, dtype=dtype).transpose(1, 2)
    bias = draw(70, dtype=dtype)
    table = PRODUCT["cuda"][dtype.itemsize]
    results = [product(a.new_empty(1, 37, 70), a, b, bias, 0.3, 1.7, tile) for _, tile in table]
    for (_, tile), result in zip(table, results, strict=True):
        assert same(result, results[0]), tile


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [8, 1000, 4096])
def test_every_step_by_descriptor_gives_the_same_bits(length: int, dtype: torch.dtype) -> None:
    """Those of the kernel without descriptors too; weights as [N, K] and as [K, N], rows that lie apart."""
    steps = [step for _, step in TMA_FEW_ROWS] + TMA_MANY_ROWS
    apart = draw(300, length + 8, dtype=dtype)[:, :length]
    bias = draw(72, dtype=dtype)
    for rows in (1, 37, 300):
        a = apart[:rows]
        for b in (draw(72, length, dtype=dtype, seed=1).t(), draw(length, 72, dtype=dtype, seed=1)):
            layout = matmul_tma.tma_layout(a, b)
            assert layout is not None and matmul_tma.tma_layout(draw(length + 1, dtype=dtype)[None, 1:], b) is None
            want = product(a.new_empty(1, rows, 72), a[None], b[None], bias, 0.3, 1.7, Tile(16, 32, 4, 6))[0]
            for step in steps:
                got = a.new_empty(rows, 72)
                matmul_tma.product(got, a, b, bias.expand(rows, 72), 0.3, 1.7, layout, step)
                assert same(got, want), (rows, step)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "columns"), [(4096, 4096), (12288, 4096), (1024, 3072)])
def test_a_product_keeps_its_bits_at_every_number_of_rows(length: int, columns: int, dtype: torch.dtype) -> None:
    a = draw(4096, length, dtype=dtype)
    b = draw(columns, length, dtype=dtype, seed=1, scale=0.02).t()
    every = call("mm", a, b)
    no_worse(every, torch.mm(a, b), a.double() @ b.double())
    for rows in (*range(1, 258), 512, 1024, 4095):
        assert same(call("mm", a[:rows], b), every[:rows]), rows
    assert same(call("mm", a[1000:1001], b.contiguous()), every[1000:1001])
