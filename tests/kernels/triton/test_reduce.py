"""Reductions and maps along a dimension, against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_cases import (
    DEVICE,
    ROUNDED,
    call,
    check,
    draw,
    outputs,
    same,
)

from bi_compile.kernels.triton.launch import watching

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "logsumexp": torch.logsumexp,
    "var_mean": lambda x, dim, correction=1: torch.var_mean(x, dim, correction=correction),
}


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 4, 127), (2, 0, 3), (0, 5), (2, 3, 4, 5)])
def test_reductions_are_right(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    everything = list(range(len(shape)))
    for dim in {(0,), (-1,), tuple(everything[::-1]), tuple(everything[-2:])} if shape else {(0,), (-1,)}:
        check(name, REDUCTIONS[name], x, list(dim))
        kept, dropped = call(name, x, list(dim), keepdim=True), call(name, x, list(dim))
        assert same(tuple(o.view(p.shape) for o, p in zip(outputs(kept), outputs(dropped), strict=True)), dropped)
    assert same(call(name, x, []), call(name, x, everything))
    if name == "var_mean":
        for correction in (0, 0.5, 2, 400):
            check(name, REDUCTIONS[name], x, everything, correction)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cumsum"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 4, 127), (2, 0, 3), (2, 3, 4, 5)])
def test_maps_along_a_dimension_are_right(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    for dim in range(-len(shape), max(len(shape), 1)):
        check(name, getattr(torch, name), draw(*shape, dtype=dtype, scale=3), dim)


def test_dtype_is_applied_before_the_sum() -> None:
    x = draw(3, 65, scale=100)
    for name, args in (("sum", ([1],)), ("mean", ([1],)), ("softmax", (1,)), ("log_softmax", (1,)), ("cumsum", (1,))):
        for dtype in (torch.float16, torch.float64):
            assert same(call(name, x, *args, dtype=dtype), call(name, x.to(dtype), *args))
        half = x.half()
        assert same(call(name, half, *args, dtype=torch.float32), call(name, half.float(), *args))


def test_infinite_and_nan_rows() -> None:
    inf, nan = math.inf, math.nan
    rows = [[-inf, -inf], [inf, 0.0], [inf, -inf], [nan, 0.0], [0.0, nan], [-inf, nan], [-inf, 1.0]]
    x = torch.tensor(rows, device=DEVICE)
    for name in ("softmax", "log_softmax"):
        torch.testing.assert_close(call(name, x, 1), getattr(torch, name)(x, 1), equal_nan=True)
    torch.testing.assert_close(call("logsumexp", x, [1]), torch.logsumexp(x, 1), equal_nan=True)
    var, mean = call("var_mean", x, [1])
    torch.testing.assert_close(var, torch.var(x, 1), equal_nan=True)
    torch.testing.assert_close(mean, torch.mean(x, 1), equal_nan=True)


@pytest.mark.parametrize("length", [96, 2048, 4096, 8192, 9008])
def test_every_row_sum_is_taken_by_the_same_threads(length: int) -> None:
    """A norm that is written out takes a mean, so these have one order: how a compiler spreads a row over threads follows tile and warps."""
    x, weight = draw(3, length), draw(length)
    cases: dict[str, tuple[Any, ...]] = {
        **{name: ([-1],) for name in REDUCTIONS},
        "softmax": (-1,),
        "rms_norm": (weight, 1e-6),
        "add_rms_norm": (x, weight, 1e-6),
        "layer_norm": (weight, weight, 1e-6),
    }
    tiles = {}
    for name, args in cases.items():
        with watching() as seen:
            call(name, x, *args)
        (launched,) = seen
        tiles[name] = {k: launched.meta.get(k) for k in ("BLOCK_R", "BLOCK_C", "WHOLE", "num_warps")}
    assert all(tile == tiles["sum"] for tile in tiles.values()), tiles
