"""The CPU kernels: invariance bit for bit, accuracy against float64, refusals, and agreement with the fakes."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bi_compile import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = [2, 3, 5, 16, 17, 33, 64, 257]
LENGTHS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 61, 64, 127, 129, 255, 1023, 1024, 1025, 2049, 4097]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

Outputs = tuple[Tensor, ...]


def rand(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64).to(dtype)


def outputs(result: Any) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same(a: Any, b: Any) -> bool:
    """Equal as bits, but for the payload of NaN and the sign of zero."""
    return all(
        x.dtype == y.dtype
        and torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num(0, 9, -9), y.nan_to_num(0, 9, -9))
        for x, y in zip(outputs(a), outputs(b), strict=True)
    )


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    wide = x.new_zeros([*x.shape[:-1], 2 * x.shape[-1] + 1])
    wide[..., 1::2] = x
    shifted = x.new_zeros(x.numel() + 1)
    shifted[1:] = x.flatten()
    padded = x.new_zeros([*x.shape[:-1], x.shape[-1] + 3])
    padded[..., : x.shape[-1]] = x
    return {
        "strided": wide[..., 1::2],
        "unaligned": shifted[1:].view(x.shape),
        "padded": padded[..., : x.shape[-1]],
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
    }


# ---- operators that take rows [R, C] and treat each alone ----


def row_operators(C: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Any]]:
    """Functions of [R, C] whose outputs have R rows."""
    w, b, weight = rand(C, dtype=dtype, seed=1), rand(C, dtype=dtype, seed=2), rand(19, C, dtype=dtype, seed=3)
    kn, bias = weight.t().contiguous(), rand(19, dtype=dtype, seed=4)
    return {
        "sum": lambda x: ops.sum(x, [1]),
        "mean": lambda x: ops.mean(x, [-1]),
        "var_mean": lambda x: ops.var_mean(x, [1]),
        "logsumexp": lambda x: ops.logsumexp(x, [1]),
        "softmax": lambda x: ops.softmax(x, 1),
        "log_softmax": lambda x: ops.log_softmax(x, -1),
        "cumsum": lambda x: ops.cumsum(x, 1),
        "rms_norm": lambda x: ops.rms_norm(x, w, 1e-6),
        "rms_norm, float32 weight": lambda x: ops.rms_norm(x, w.float(), 1e-6),
        "rms_norm, no weight": lambda x: ops.rms_norm(x, None, 1e-6),
        "add_rms_norm": lambda x: ops.add_rms_norm(x, x * 0.5, w, 1e-6),
        "layer_norm": lambda x: ops.layer_norm(x, w, b, 1e-5),
        "group_norm": lambda x: ops.group_norm(x, w, b, 1, 1e-5),
        "mm [N, K]": lambda x: ops.mm(x, weight.t()),
        "mm [K, N]": lambda x: ops.mm(x, kn),
        "addmm": lambda x: ops.addmm(bias, x, weight.t()),
        "bmm": lambda x: ops.bmm(x[:, None], kn.expand(len(x), -1, -1)),
    }


@each_dtype
@pytest.mark.parametrize("C", [1, 17, 61, 257, 1025])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, C: int) -> None:
    x = rand(257, C, dtype=dtype)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    for name, run in row_operators(C, dtype).items():
        whole = outputs(run(x))
        for rows in ROWS:
            assert same(run(x[:rows]), [y[:rows] for y in whole]), (name, rows)
        for row in (0, 1, 5, 6, 47, 48, 128, 255, 256):
            assert same(run(x[row : row + 1]), [y[row : row + 1] for y in whole]), (name, row)
        assert same(run(x[order]), [y[order] for y in whole]), name


@each_dtype
@pytest.mark.parametrize("C", [16, 61, 1025])
def test_layout_and_threads_do_not_matter(dtype: torch.dtype, C: int) -> None:
    x = rand(67, C, dtype=dtype)
    for name, run in row_operators(C, dtype).items():
        want = run(x)
        for layout, other in layouts(x).items():
            assert torch.equal(other, x)
            assert same(run(other), want), (name, layout)
        assert same(run(x[:1].expand(9, -1)), [y[:1].expand(9, *y.shape[1:]) for y in outputs(want)]), name
        for n in (1, 2, 3):
            with threads(n):
                assert same(run(x), want), (name, n)


@each_dtype
def test_neighbours_may_hold_anything(dtype: torch.dtype) -> None:
    x = rand(33, 129, dtype=dtype)
    for value in (math.nan, math.inf, -math.inf, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4):
        dirty = x.clone()
        dirty[::2] = value
        dirty[3, 7] = value
        keep = [i for i in range(1, 33, 2) if i != 3]
        for name, run in row_operators(129, dtype).items():
            assert same([y[keep] for y in outputs(run(dirty))], [y[keep] for y in outputs(run(x))]), (name, value)


# ---- products ----


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


# ---- accuracy ----


def no_worse(name: str, got: Any, native: Any, exact: Any, dtype: torch.dtype) -> None:
    for g, n, e in zip(outputs(got), outputs(native), outputs(exact), strict=True):
        assert g.shape == n.shape == e.shape, name
        ours, theirs = ((t.double() - e).abs().mean().item() for t in (g, n))
        # float64 has no wider reference: a few roundings of the result's size
        slack = e.abs().mean().item() * torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 1e-3)
        assert ours <= 1.05 * theirs + slack, (name, ours, theirs)


@each_dtype
@pytest.mark.parametrize("C", [7, 128, 1023, 4096])
def test_rows_are_no_less_accurate_than_torch(dtype: torch.dtype, C: int) -> None:
    w, b, x = rand(C, dtype=dtype, seed=1), rand(C, dtype=dtype, seed=2), rand(64, C, dtype=dtype) * 3 + 1
    stat = torch.float64 if dtype == torch.float64 else torch.float32

    def rms(t: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(t, (C,), weight, 1e-6)

    cases: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "sum": (lambda t, w, b: ops.sum(t, [1]), lambda t, w, b: t.sum(1)),
        "mean": (lambda t, w, b: ops.mean(t, [1]), lambda t, w, b: t.mean(1)),
        "var_mean": (lambda t, w, b: ops.var_mean(t, [1]), lambda t, w, b: torch.var_mean(t, 1)),
        "logsumexp": (lambda t, w, b: ops.logsumexp(t, [1]), lambda t, w, b: t.logsumexp(1)),
        "softmax": (lambda t, w, b: ops.softmax(t, 1), lambda t, w, b: t.softmax(1)),
        "log_softmax": (lambda t, w, b: ops.log_softmax(t, 1), lambda t, w, b: t.log_softmax(1)),
        "cumsum": (lambda t, w, b: ops.cumsum(t, 1), lambda t, w, b: t.cumsum(1)),
        "rms_norm": (lambda t, w, b: ops.rms_norm(t, w, 1e-6)[0], lambda t, w, b: rms(t, w)),
        "layer_norm": (
            lambda t, w, b: ops.layer_norm(t, w, b, 1e-5)[0],
            lambda t, w, b: F.layer_norm(t, (C,), w, b, 1e-5),
        ),
        "group_norm": (
            lambda t, w, b: ops.group_norm(t.view(4, 16, C), w[:7].repeat(3)[:16], None, 4, 1e-5)[0],
            lambda t, w, b: F.group_norm(t.view(4, 16, C), 4, w[:7].repeat(3)[:16], None, 1e-5),
        ),
    }
    for name, (ours, native) in cases.items():
        no_worse(name, ours(x, w, b), native(x, w, b), native(x.double(), w.double(), b.double()), dtype)
    assert ops.rms_norm(x, w, 1e-6)[1].dtype == stat


@each_dtype
@pytest.mark.parametrize("K", [64, 1024, 5000])
def test_products_are_no_less_accurate_than_torch(dtype: torch.dtype, K: int) -> None:
    a, w = rand(64, K, dtype=dtype), rand(96, K, dtype=dtype, seed=1)
    no_worse("mm", ops.mm(a, w.t()), a @ w.t(), a.double() @ w.double().t(), dtype)


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_no_less_accurate_than_torch(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (rand(2, 4, n, 64, dtype=dtype, seed=i) for i, n in enumerate((100, 130, 130)))
    native = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    no_worse("attention", ops.scaled_dot_product_attention(q, k, v, None, causal)[0], native, exact, dtype)


def test_exp_over_its_whole_range() -> None:
    low = torch.cat([torch.linspace(-104, 0, 100_001), torch.tensor([-1e30, -math.inf])])
    x = torch.stack([torch.zeros_like(low), low], 1)
    no_worse("softmax", ops.softmax(x, 1), x.softmax(1), x.double().softmax(1), torch.float32)
    got, want = ops.softmax(x, 1)[:, 1].double(), x.double().softmax(1)[:, 1]
    normal = want > torch.finfo(torch.float32).tiny
    assert ((got - want).abs()[normal] / want[normal]).max() < 1.5 * torch.finfo(torch.float32).eps
    assert (got - want).abs()[~normal].max() < 2e-45


# ---- reductions ----


@each_dtype
def test_dimensions_are_read_in_row_major_order(dtype: torch.dtype) -> None:
    x = rand(3, 5, 7, dtype=dtype)
    flat = x.permute(1, 0, 2).reshape(5, 21)
    for run, flat_run in (
        (ops.sum, ops.sum),
        (ops.mean, ops.mean),
        (ops.logsumexp, ops.logsumexp),
        (ops.var_mean, ops.var_mean),
    ):
        want = outputs(flat_run(flat, [1]))
        for dims in ([0, 2], [2, 0], [-1, 0], [-3, -1]):
            assert same(run(x, dims), want)
            assert [y.shape for y in outputs(run(x, dims, keepdim=True))] == [(1, 5, 1)] * len(want)
        assert same(run(x, []), [y[0] for y in outputs(run(x.view(1, -1), [1]))])
    for run in (ops.softmax, ops.log_softmax, ops.cumsum):
        for dim in range(3):
            got = run(x, dim)
            assert got.is_contiguous() and same(got, run(x.transpose(dim, 2).contiguous(), 2).transpose(dim, 2))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@each_dtype
def test_scalars_and_empty_tensors(dtype: torch.dtype) -> None:
    scalar = torch.tensor(3.0, dtype=dtype)
    for dims in ([], [0], [-1]):
        for name in ("sum", "mean", "logsumexp"):
            assert torch.equal(getattr(ops, name)(scalar, dims), scalar)
        assert same(ops.var_mean(scalar, dims), torch.var_mean(scalar, dim=dims))
    for dim in (0, -1):
        assert ops.softmax(scalar, dim) == 1 and ops.log_softmax(scalar, dim) == 0 and ops.cumsum(scalar, dim) == 3
    none = torch.empty(4, 0, dtype=dtype)
    assert torch.equal(ops.sum(none, [1]), torch.zeros(4, dtype=dtype))
    assert ops.mean(none, [1]).isnan().all() and all(t.isnan().all() for t in ops.var_mean(none, [1]))
    assert torch.equal(ops.logsumexp(none, [1]), torch.full([4], -math.inf, dtype=dtype))
    assert ops.sum(none, [0]).shape == (0,) and ops.softmax(none, 0).shape == ops.cumsum(none, 1).shape == (4, 0)
    assert ops.softmax(none, 1).shape == (4, 0)
    assert [t.shape for t in ops.rms_norm(none, none[0], 1e-6)] == [(4, 0), (4, 1)]
    assert [t.shape for t in ops.layer_norm(none.t(), None, None, 1e-6)] == [(0, 4), (0, 1), (0, 1)]
    for M, K, N in [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]:
        got = ops.mm(torch.ones(M, K, dtype=dtype), torch.ones(K, N, dtype=dtype))
        assert torch.equal(got, torch.zeros(M, N, dtype=dtype))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@each_dtype
def test_inf_nan_and_zeros_as_torch(dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    rows = [
        [inf, 1, 2],
        [-inf, 1, 2],
        [nan, 1, 2],
        [-inf] * 3,
        [inf, -inf, 0],
        [inf, inf, 1],
        [-0.0] * 3,
        [nan, inf, -inf],
    ]
    x = torch.tensor(rows, dtype=dtype)
    for got, want in (
        (ops.softmax(x, 1), x.softmax(1)), (ops.log_softmax(x, 1), x.log_softmax(1)), (ops.sum(x, [1]), x.sum(1)),
        (ops.logsumexp(x, [1]), x.logsumexp(1)), (ops.cumsum(x, 1), x.cumsum(1)), (ops.mean(x, [1]), x.mean(1)),
        (ops.var_mean(x, [1])[0], torch.var_mean(x, 1)[0]),
    ):  # fmt: skip
        torch.testing.assert_close(got, want, equal_nan=True)
    for correction in (0, 1, 3, 5, 0.5):
        var, mean = ops.var_mean(x, [1], correction)
        torch.testing.assert_close(var, torch.var(x, 1, correction=correction), equal_nan=True)
        # torch.var_mean gives NaN for the mean of a row with an inf, torch.mean inf
        assert same(mean, ops.mean(x, [1]))


@each_dtype
@pytest.mark.parametrize("out", DTYPES, ids=lambda d: str(d)[6:])
def test_dtype_casts_first(dtype: torch.dtype, out: torch.dtype) -> None:
    x = rand(5, 67, dtype=dtype) * 10
    for name, dim in (("sum", [1]), ("mean", [1]), ("softmax", 1), ("log_softmax", 1), ("cumsum", 1)):
        run = getattr(ops, name)
        assert run(x, dim, dtype=out).dtype == out and torch.equal(run(x, dim, dtype=out), run(x.to(out), dim)), name


@pytest.mark.parametrize(("dtype", "half", "tiny"), [(torch.bfloat16, 2**-8, 2**-28), (torch.float16, 2**-11, 2**-24)])
def test_sums_are_rounded_once(dtype: torch.dtype, half: float, tiny: float) -> None:
    """A sum just above the middle of two neighbours goes up; in float32 it would lie on the middle, and go down."""
    x = torch.tensor([1.0, half, tiny], dtype=dtype)
    assert ops.sum(x, [0]).item() == ops.cumsum(x, 0)[2].item() == 1 + 2 * half
    assert ops.sum(-x, [0]).item() == -1 - 2 * half


@each_dtype
def test_add_rms_norm_is_rms_norm_of_the_sum(dtype: torch.dtype) -> None:
    for shape in ((3, 64), (2, 5, 67), (67,), (0, 8)):
        x, residual, w = (
            rand(*shape, dtype=dtype),
            rand(*shape, dtype=dtype, seed=1),
            rand(shape[-1], dtype=dtype, seed=2),
        )
        for weight in (w, w.float(), None):
            y, rstd, s = ops.add_rms_norm(x, residual, weight, 1e-6)
            assert torch.equal(s, x + residual) and same((y, rstd), ops.rms_norm(s, weight, 1e-6))


@each_dtype
def test_group_norm_has_the_statistics_of_layer_norm(dtype: torch.dtype) -> None:
    for N, channels, groups, rest in ((2, 6, 3, (5, 7)), (3, 8, 8, (16,)), (1, 4, 1, ()), (2, 4, 2, (0,))):
        x = rand(N, channels, *rest, dtype=dtype)
        w, b = rand(channels, dtype=dtype, seed=1), rand(channels, dtype=dtype, seed=2)
        y, mean, rstd = ops.group_norm(x, w, b, groups, 1e-5)
        _, mean1, rstd1 = ops.layer_norm(x.reshape(N, groups, channels // groups * math.prod(rest)), None, None, 1e-5)
        assert same((mean, rstd), (mean1[..., 0], rstd1[..., 0])) and y.is_contiguous()
        if y.numel():
            assert same(ops.group_norm(x[:1], w, b, groups, 1e-5), (y[:1], mean[:1], rstd[:1]))


# ---- attention ----


def heads(
    L: int, S: int, dtype: torch.dtype, B: int = 2, Hq: int = 4, Hkv: int = 2, D: int = 40, Dv: int = 24
) -> list[Tensor]:
    sizes = [(B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv)]
    return [rand(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


@each_dtype
def test_a_query_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    q, k, v = heads(100, 70, dtype)
    out, lse = ops.scaled_dot_product_attention(q, k, v)
    for l0, l1 in ((0, 1), (7, 8), (99, 100), (3, 20), (40, 100)):
        assert same(ops.scaled_dot_product_attention(q[:, :, l0:l1], k, v), (out[:, :, l0:l1], lse[:, :, l0:l1]))
    for b, h in itertools.product(range(2), range(4)):
        alone = ops.scaled_dot_product_attention(
            q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1], v[b : b + 1, h // 2 : h // 2 + 1]
        )
        assert same(alone, (out[b : b + 1, h : h + 1], lse[b : b + 1, h : h + 1]))
    for n in (1, 2, 3):
        with threads(n):
            assert same(ops.scaled_dot_product_attention(q, k, v), (out, lse))
    for layout in ("strided", "padded", "unaligned", "transposed"):
        assert same(ops.scaled_dot_product_attention(*(layouts(t)[layout] for t in (q, k, v))), (out, lse)), layout
    heads_last = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert same(ops.scaled_dot_product_attention(*heads_last), (out, lse))


@each_dtype
@pytest.mark.parametrize("S", [1, 15, 33, 300, 1500])
def test_masked_keys_at_the_end_do_not_matter(dtype: torch.dtype, S: int) -> None:
    q, k, v = heads(9, S, dtype)
    want = ops.scaled_dot_product_attention(q, k, v)
    for more, filler in itertools.product((1, 16, 1030), (0.0, 1.0, math.nan, math.inf)):
        longer = [torch.cat([t, t.new_full([2, 2, more, t.shape[-1]], filler)], 2) for t in (k, v)]
        seen = torch.arange(S + more) < S
        for mask in (seen, torch.zeros(S + more).masked_fill(~seen, -math.inf).to(dtype)):
            assert same(ops.scaled_dot_product_attention(q, *longer, mask), want), (more, filler)
    causal = ops.scaled_dot_product_attention(q, k, v, None, True)
    for i in range(min(9, S)):
        part = ops.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        assert same(part, [t[:, :, i : i + 1] for t in causal]), i


@each_dtype
def test_attention_masks_broadcast(dtype: torch.dtype) -> None:
    q, k, v = heads(9, 21, dtype)
    full = rand(2, 4, 9, 21) > 0
    full[..., 0] = True
    for index in itertools.product((0, 1), repeat=4):
        mask = full[tuple(slice(None) if keep else slice(0, 1) for keep in index)]
        wide = mask.expand(2, 4, 9, 21).contiguous()
        want = ops.scaled_dot_product_attention(q, k, v, wide, scale=0.3)
        added = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
        for given in (mask, mask.expand(2, 4, 9, 21), added):
            assert same(ops.scaled_dot_product_attention(q, k, v, given, scale=0.3), want)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), wide, scale=0.3, enable_gqa=True)
        if wide.any(-1).all():
            torch.testing.assert_close(want[0], exact.to(dtype), atol=3e-2 if dtype.itemsize == 2 else 1e-5, rtol=2e-2)
    two = full[0, 0]
    assert same(
        ops.scaled_dot_product_attention(q, k, v, two), ops.scaled_dot_product_attention(q, k, v, two[None, None])
    )


@each_dtype
def test_rows_without_a_key(dtype: torch.dtype) -> None:
    q, k, v = heads(5, 7, dtype)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out, lse = ops.scaled_dot_product_attention(q, k, v, mask)
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all() and lse[:, :, 3].isfinite().all()
    out, lse = ops.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0])
    assert (out == 0).all() and (lse == -math.inf).all()


@each_dtype
def test_logsumexp_of_the_scores(dtype: torch.dtype) -> None:
    q, k, v = heads(20, 30, dtype)
    _, lse = ops.scaled_dot_product_attention(q, k, v)
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / math.sqrt(40)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_values_that_are_not_finite_reach_only_rows_that_see_them() -> None:
    q, k, v = heads(12, 12, torch.float32)
    clean = ops.scaled_dot_product_attention(q, k, v, None, True)[0]
    v = v.clone()
    v[:, :, 8, 3] = math.inf
    dirty = ops.scaled_dot_product_attention(q, k, v, None, True)[0]
    assert torch.equal(dirty[:, :, :8], clean[:, :, :8])
    assert dirty[:, :, 8:, 3].isinf().all()
    others = [i for i in range(24) if i != 3]
    assert torch.equal(dirty[..., others], clean[..., others])


# ---- the fakes, refusals ----


def examples(dtype: torch.dtype) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    x, w, m = rand(3, 5, 8, dtype=dtype), rand(8, dtype=dtype), rand(8, 8, dtype=dtype)
    q = rand(2, 4, 3, 8, dtype=dtype).transpose(1, 2)
    return {
        "mm": ((m, m.t()), {}),
        "addmm": ((w, m, m), {"beta": 2, "alpha": 3}),
        "bmm": ((x, x.transpose(1, 2)), {}),
        "baddbmm": ((rand(1, dtype=dtype)[:, None, None], x, x.transpose(1, 2)), {}),
        "sum": ((x.transpose(0, 1), [0, -1], True), {"dtype": torch.float32}),
        "mean": ((x.transpose(0, 1), []), {}),
        "var_mean": ((x.transpose(0, 1), [1], 0), {}),
        "logsumexp": ((x.transpose(0, 1), [1]), {}),
        "softmax": ((x.transpose(0, 1), 1), {"dtype": torch.float64}),
        "log_softmax": ((x.transpose(0, 2), -1), {}),
        "cumsum": ((x.transpose(0, 1), 0), {}),
        "rms_norm": ((x.transpose(0, 1), w, 1e-6), {}),
        "add_rms_norm": ((x.transpose(0, 1), x.transpose(0, 1), w, 1e-6), {}),
        "layer_norm": ((x.transpose(0, 1), w, w, 1e-6), {}),
        "group_norm": ((rand(2, 8, 3, dtype=dtype).to(memory_format=torch.contiguous_format), w, w, 2, 1e-6), {}),
        "scaled_dot_product_attention": ((q, q, q), {"is_causal": True}),
    }


@each_dtype
def test_outputs_are_what_the_fakes_say(dtype: torch.dtype) -> None:
    for name, (args, kwargs) in examples(dtype).items():
        real = outputs(ops.OPERATORS[name](*args, **kwargs))
        with FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fakes = outputs(ops.OPERATORS[name](*fake_args, **kwargs))
        for r, f in zip(real, fakes, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), name


def test_schemas() -> None:
    for name, (args, kwargs) in examples(torch.float32).items():
        torch.library.opcheck(ops.OPERATORS[name], args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_has_a_kernel() -> None:
    ops.load_kernels("cpu")
    assert set(examples(torch.float32)) <= set(ops.OPERATORS)
    for name in ops.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bi_compile::{name}", "CPU"), name


def test_another_dtype_is_refused_by_name() -> None:
    for name, (args, kwargs) in examples(torch.float32).items():
        for other in (torch.int64, torch.complex64, torch.bool):
            changed = [a.to(other) if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
            with pytest.raises(RuntimeError, match=f"bi_compile::{name} has no kernel"):
                ops.OPERATORS[name](*changed, **kwargs)
    with pytest.raises(RuntimeError, match="bi_compile::sum has no kernel"):
        ops.sum(torch.ones(3), [0], dtype=torch.int32)


W4, X34 = torch.ones(4), torch.ones(3, 4)
REFUSED: list[tuple[str, tuple[Any, ...]]] = [
    ("mm", (X34, X34)),
    ("mm", (X34, X34.t().double())),
    ("mm", (X34, W4)),
    ("addmm", (W4.double(), X34, X34.t())),
    ("addmm", (W4, X34, X34.t())),
    ("bmm", (X34, X34)),
    ("bmm", (X34[None], X34.t()[None].expand(2, -1, -1))),
    ("baddbmm", (torch.ones(2, 3, 3), X34[None], X34.t()[None])),
    ("rms_norm", (X34, torch.ones(3), 1e-6)),
    ("rms_norm", (torch.tensor(1.0), None, 1e-6)),
    ("rms_norm", (X34, torch.ones(4, dtype=torch.int32), 1e-6)),
    ("add_rms_norm", (X34, X34.double(), None, 1e-6)),
    ("add_rms_norm", (X34, torch.ones(4), None, 1e-6)),
    ("layer_norm", (X34, None, torch.ones(3), 1e-6)),
    ("group_norm", (X34, None, None, 3, 1e-6)),
    ("group_norm", (X34, torch.ones(3), None, 2, 1e-6)),
    ("scaled_dot_product_attention", (X34, X34, X34)),
    ("scaled_dot_product_attention", (X34[None, None], X34[None, None], X34[None, None].double())),
    ("scaled_dot_product_attention", (torch.ones(1, 3, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8))),
    ("scaled_dot_product_attention", (torch.ones(1, 2, 2, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 2, 8))),
    ("scaled_dot_product_attention", (*[torch.ones(1, 2, 3, 8)] * 3, torch.ones(3, 2))),
    ("scaled_dot_product_attention", (*[torch.ones(1, 2, 3, 8)] * 3, torch.ones(3, 3, dtype=torch.int64))),
]


@pytest.mark.parametrize(("name", "args"), REFUSED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(REFUSED)])
def test_what_does_not_fit_is_refused_by_name(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError, match=f"bi_compile::{name}"):
        ops.OPERATORS[name](*args)


@pytest.mark.parametrize("name", ["sum", "mean", "logsumexp", "var_mean"])
def test_wrong_dimensions_are_refused_by_name(name: str) -> None:
    run = ops.OPERATORS[name]
    with pytest.raises(IndexError, match=f"bi_compile::{name}"):
        run(X34, [2])
    with pytest.raises(RuntimeError, match=f"bi_compile::{name}.*twice"):
        run(X34, [1, -1])


def test_one_openmp_runtime() -> None:
    """That of torch; in a process of its own, since other packages bring theirs."""
    code = "from bi_compile import ops; ops.load_kernels('cpu'); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(set(re.findall(r"/\S*lib(?:g|i)?omp\S*", maps))) == 1, maps
