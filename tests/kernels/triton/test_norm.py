"""Normalisations, against PyTorch; heads that are a view of a wider product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton_cases import (
    FLOATS,
    ROUNDED,
    Outputs,
    call,
    check,
    draw,
    same,
    statistic,
    weight,
)


def rms(x: Tensor, w: Tensor | None, eps: float) -> Outputs:
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True, dtype=statistic(x)) + eps)
    return (x * rstd * (1 if w is None else w)).to(x.dtype), rstd


def layer(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Outputs:
    var, mean = torch.var_mean(x.to(statistic(x)), -1, correction=0, keepdim=True)
    return functional.layer_norm(x, x.shape[-1:], w, b, eps), mean, torch.rsqrt(var + eps)


def group(x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, eps: float) -> Outputs:
    var, mean = torch.var_mean(x.to(statistic(x)).reshape(x.shape[0], groups, -1), -1, correction=0)
    return functional.group_norm(x, groups, w, b, eps), mean, torch.rsqrt(var + eps)


@pytest.mark.parametrize("heads, length", [(2, 128), (3, 64), (16, 128), (5, 96), (2, 8192), (2, 9008)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_heads_are_normalised_where_they_lie(heads: int, length: int, dtype: torch.dtype) -> None:
    """A query's heads in the output of one product for query, key and value, and their copy; at any number of rows."""
    together = draw(37, (heads + 3) * length, dtype=dtype)
    x = together[:, length : (heads + 1) * length].view(37, heads, length)
    want = call("rms_norm", x.contiguous(), weight(x, 1), 1e-6)
    for rows in (1, 2, 17, 37):
        got = call("rms_norm", x[:rows], weight(x, 1), 1e-6)
        assert all(same(g, w[:rows]) for g, w in zip(got, want, strict=True)), rows


@pytest.mark.parametrize("heads", [(2, 1), (16, 8), (3, 3)])
@pytest.mark.parametrize("length", [7, 96, 128])
@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queries_and_keys_in_one_launch(heads: tuple[int, int], length: int, dtype: torch.dtype, more: int) -> None:
    """The bits of two, at any number of tokens, with what lies behind them; in two launches where a norm alone would read otherwise."""
    qkv = draw(19, (sum(heads) + 2) * length + more, dtype=dtype)
    weights = [draw(length, dtype=dtype, seed=i) for i in (1, 2)]
    first, second, _ = qkv.split([heads[0] * length, heads[1] * length, 2 * length + more], 1)
    parts = [x.unflatten(1, (-1, length)) for x in (first, second)]
    for ws in (weights, [w.float() for w in weights]):
        want = [call("rms_norm", x, w, 1e-6)[0] for x, w in zip(parts, ws, strict=True)]
        for rows in (0, 1, 2, 19):
            got = call("qk_norm", qkv[:rows], *ws, *heads, 1e-6)
            assert all(same(g, w[:rows].contiguous()) for g, w in zip(got, want, strict=True)), rows


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 7), (5, 128), (3, 4099), (0, 8)])
def test_norms_are_right(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, r = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    w, b = weight(x, 2), weight(x, 3)
    for scale in (w, None):
        check("rms_norm", rms, x, scale, 1e-6)
        y, rstd, s = call("add_rms_norm", x, r, scale, 1e-6)
        assert same(s, x + r)
        assert same((y, rstd), call("rms_norm", s, scale, 1e-6))
        for shift in (b, None):
            check("layer_norm", layer, x, scale, shift, 1e-5)
    assert same(call("rms_norm", x.half(), w.float(), 1e-6), call("rms_norm", x.half(), w.float(), 1e-6))


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 7, 9), (3, 6, 1, 1)])
def test_group_norm_is_right(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = draw(*shape, dtype=dtype), draw(6, dtype=dtype, seed=2), draw(6, dtype=dtype, seed=3)
    for groups in (1, 2, 3):
        for scale, shift in ((w, b), (w, None), (None, None)):
            check("group_norm", group, x, scale, shift, groups, 1e-5)
