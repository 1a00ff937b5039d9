"""Products: both kernels give the same bits, and are no less accurate than PyTorch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import each_dtype, layouts, no_worse, rand, same, threads

from bi_compile import ops

LENGTHS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 61, 64, 127, 129, 255, 1023, 1024, 1025, 2049, 4097]


@each_dtype
@pytest.mark.parametrize("K", [0, *LENGTHS])
def test_both_product_kernels_give_the_same_bits(dtype: torch.dtype, K: int) -> None:
    for M, N in itertools.product((1, 2, 3, 4, 5, 6, 7, 50), (1, 3, 16, 67)):
        a, w = rand(M, K, dtype=dtype), rand(N, K, dtype=dtype, seed=1)
        kn = w.t().contiguous()
        want = ops.mm(a, w.t())
        assert want.shape == (M, N) and want.is_contiguous()
        assert torch.equal(ops.mm(a, kn), want), (M, N)
        assert K == 0 or torch.equal(ops.mm(a, layouts(kn)["strided"]), want), (M, N)
        assert torch.equal(ops.bmm(a[None], kn[None])[0], want), (M, N)
        assert torch.equal(ops.addmm(want.new_full([N], math.nan), a, kn, beta=0), want), (M, N)


def framed(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of many sizes, and infinity, NaN and both zeros among them, in a frame of NaN."""
    frame = torch.full((rows + 1, columns + 3), math.nan, dtype=dtype)
    x = rand(rows, columns, dtype=dtype, seed=seed) * 2.0 ** (8 * rand(rows, columns, seed=seed + 1)).round().to(dtype)
    x[rows // 3, columns // 2], x[rows // 2], x[-1, -1] = math.inf, -0.0, math.nan
    return frame[:rows, :columns].copy_(x)


@each_dtype
@pytest.mark.parametrize("K", [1, 15, 31, 33, 1023, 1024, 1026, 2049, 3100])
def test_many_rows_have_the_bits_of_few(dtype: torch.dtype, K: int) -> None:
    """From some number of rows on the operands are packed."""
    for M, N in [(56, 2050), (96, 256), (97, 193), (107, 319), (300, 257), (1500 if K < 40 else 145, 200)]:
        a, w = framed(M, K, dtype, 0), framed(N, K, dtype, 2)
        bias = rand(N, dtype=dtype, seed=4)
        few = [ops.mm(rows, w.t()) for rows in a.split(37)]
        want = torch.cat(few)
        assert want.isfinite().any(), (M, N)
        for b in (w.t(), framed(K, N, dtype, 6).copy_(w.t())):
            assert same(ops.mm(a, b), want), (M, N)
            assert same(
                ops.addmm(bias, a, b, beta=0.5, alpha=3)[37:74], ops.addmm(bias, a[37:74], b, beta=0.5, alpha=3)
            ), (M, N)
        with threads(1):
            assert same(ops.mm(a, w.t()), want), (M, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_are_packed_some_at_a_time(dtype: torch.dtype) -> None:
    a, w = rand(250, 20_000, dtype=dtype), rand(260, 20_000, dtype=dtype, seed=1)
    assert torch.equal(ops.mm(a, w.t()), torch.cat([ops.mm(rows, w.t()) for rows in a.split(50)]))


@each_dtype
def test_trailing_zeros_in_k_are_harmless(dtype: torch.dtype) -> None:
    for K, more in itertools.product((1, 15, 16, 33, 1000, 1024), (1, 16, 31, 1030)):
        a, w = rand(9, K, dtype=dtype), rand(21, K, dtype=dtype, seed=1)
        longer = ops.mm(F.pad(a, (0, more)), F.pad(w, (0, more)).t())
        assert torch.equal(longer, ops.mm(a, w.t())), (K, more)
        assert torch.equal(longer, ops.mm(F.pad(a, (0, more)), F.pad(w, (0, more)).t().contiguous())), (K, more)


@each_dtype
def test_each_pair_of_a_batch_is_its_mm(dtype: torch.dtype) -> None:
    for B, M, K, N in [(1, 5, 33, 9), (7, 1, 64, 64), (3, 50, 129, 70), (2, 3, 1, 1)]:
        a, w, bias = rand(B, M, K, dtype=dtype), rand(B, N, K, dtype=dtype, seed=1), rand(B, M, N, dtype=dtype, seed=2)
        for b in (w.transpose(1, 2), w.transpose(1, 2).contiguous()):
            assert torch.equal(ops.bmm(a, b), torch.stack([ops.mm(*pair) for pair in zip(a, b, strict=True)]))
            got = ops.baddbmm(bias, a, b, beta=0.5, alpha=2)
            assert torch.equal(
                got, torch.stack([ops.addmm(*t, beta=0.5, alpha=2) for t in zip(bias, a, b, strict=True)])
            )
    shared = rand(64, 40, dtype=dtype)
    a = rand(3, 5, 64, dtype=dtype)
    assert torch.equal(ops.bmm(a, shared.expand(3, -1, -1)).flatten(0, 1), ops.mm(a.flatten(0, 1), shared))


@each_dtype
@pytest.mark.parametrize("K", [0, 8, 40, 1536, 9000])
def test_segments_are_joined_in_pairs_however_many_processes_have_them(dtype: torch.dtype, K: int) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for M, N, segments in [(1, 3, 8), (7, 67, 4), (50, 16, 2), (5, 9, 1), (130, 2100, 8)]:
        a, w = rand(M, K, dtype=dtype), rand(N, K, dtype=dtype, seed=1)
        want = ops.mm_segments(a, w.t(), segments)
        assert want.shape == (M, N) and want.dtype == wide
        assert torch.equal(ops.mm_segments(a, w.t().contiguous(), segments), want)
        assert torch.equal(ops.mm_segments(a[M // 2 :], w.t(), segments), want[M // 2 :])
        for ranks in (2**i for i in range(segments.bit_length())):
            parts = [ops.mm_segments(x, y.t(), segments // ranks) for x, y in _of_ranks(a, w, ranks)]
            assert torch.equal(ops.in_pairs(torch.stack(parts)), want), (M, N, segments, ranks)
        leaves = [ops.mm(x, y.t()) for x, y in _of_ranks(a, w, segments)]
        if dtype == wide:
            assert torch.equal(ops.in_pairs(torch.stack(leaves)), want)
        elif segments == 1:
            assert torch.equal(want.to(dtype), leaves[0])


def _of_ranks(a: torch.Tensor, w: torch.Tensor, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each rank's part of K, in memory of its own."""
    k = a.shape[1] // ranks
    parts = [slice(r * k, (r + 1) * k) for r in range(ranks)]
    return [(a[:, part].contiguous(), w[:, part].contiguous()) for part in parts]


def test_the_tree_of_segments() -> None:
    """((1 + 2^-24) + (2^-24 + 2^-24)) is more than 1; one after another it is 1."""
    a = torch.tensor([[1.0, 2.0**-24, 2.0**-24, 2.0**-24]])
    assert ops.mm_segments(a, torch.ones(4, 1), 4).item() == 1 + 2.0**-23
    assert ops.in_pairs(torch.tensor([1.0, 2.0**-24, 2.0**-24, 2.0**-24])).item() == 1 + 2.0**-23


@each_dtype
def test_bias_broadcasts(dtype: torch.dtype) -> None:
    a, w = rand(10, 33, dtype=dtype), rand(33, 20, dtype=dtype)
    for shape in [(10, 20), (20,), (1, 20), (10, 1), (1, 1), (1,), ()]:
        bias = rand(*shape, dtype=dtype, seed=5)
        want = ops.addmm(bias.expand(10, 20).contiguous(), a, w, beta=2, alpha=0.5)
        assert torch.equal(ops.addmm(bias, a, w, beta=2, alpha=0.5), want), shape
        exact = 2 * bias.double() + 0.5 * (a.double() @ w.double())
        assert (want.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    with pytest.raises(RuntimeError, match=r"bi_compile::addmm.*broadcast"):
        ops.addmm(rand(3, dtype=dtype), a, w)


def test_products_of_inf_and_nan() -> None:
    a, b = torch.tensor([[math.inf, 1.0], [math.nan, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, math.inf]])
    for other in (b, b.t().contiguous().t()):
        assert same(ops.mm(a, other), a @ b)


def test_subnormal_products_are_kept() -> None:
    a, b = torch.full([1, 1], 1e-20), torch.full([1, 3], 1e-20)
    assert torch.equal(ops.mm(a, b), a @ b) and (ops.mm(a, b) > 0).all()


@each_dtype
@pytest.mark.parametrize("K", [64, 1024, 5000])
def test_products_are_no_less_accurate_than_torch(dtype: torch.dtype, K: int) -> None:
    a, w = rand(64, K, dtype=dtype), rand(96, K, dtype=dtype, seed=1)
    no_worse("mm", ops.mm(a, w.t()), a @ w.t(), a.double() @ w.double().t(), dtype)
