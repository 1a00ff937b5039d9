"""Reductions: dimensions, scalars, empty tensors, dtypes, values that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import DTYPES, each_dtype, no_worse, outputs, rand, same

from bi_compile import ops


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


def test_exp_over_its_whole_range() -> None:
    low = torch.cat([torch.linspace(-104, 0, 100_001), torch.tensor([-1e30, -math.inf])])
    x = torch.stack([torch.zeros_like(low), low], 1)
    no_worse("softmax", ops.softmax(x, 1), x.softmax(1), x.double().softmax(1), torch.float32)
    got, want = ops.softmax(x, 1)[:, 1].double(), x.double().softmax(1)[:, 1]
    normal = want > torch.finfo(torch.float32).tiny
    assert ((got - want).abs()[normal] / want[normal]).max() < 1.5 * torch.finfo(torch.float32).eps
    assert (got - want).abs()[~normal].max() < 2e-45
