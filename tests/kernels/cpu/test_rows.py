"""Every operator over rows [R, C]: a row's bits are its own, in every layout, with any neighbours, on any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import each_dtype, layouts, no_worse, outputs, rand, same, threads
from torch import Tensor

from bi_compile import ops

ROWS = [2, 3, 5, 16, 17, 33, 64, 257]


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


@each_dtype
@pytest.mark.parametrize("C", [7, 128, 1023, 4096])
def test_rows_are_no_less_accurate_than_torch(dtype: torch.dtype, C: int) -> None:
    w, b, x = rand(C, dtype=dtype, seed=1), rand(C, dtype=dtype, seed=2), rand(64, C, dtype=dtype) * 3 + 1
    stat = torch.float64 if dtype == torch.float64 else torch.float32

    def rms(t: Tensor, weight: Tensor) -> Tensor:
        """As models write it, which round before they multiply by the weight."""
        h = t.to(torch.promote_types(t.dtype, torch.float32))
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(t.dtype)

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
