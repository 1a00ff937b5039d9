"""Normalisations that promise the bits of one another."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import each_dtype, rand, same

import bi_compile
from bi_compile import ops


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_where_models_do(dtype: torch.dtype) -> None:
    """transformers' models write it with these operators; under the fallback they have the bits of the operator."""
    for size in (1, 7, 64, 1000, 1025):
        x, w = rand(33, size, dtype=dtype), rand(size, dtype=dtype, seed=1)
        with bi_compile.invariant():
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            assert torch.equal(ops.rms_norm(x, w, 1e-6)[0], w * h.to(dtype))
            assert torch.equal(ops.rms_norm(x, 1 + w.float(), 1e-6)[0], (h * (1 + w.float())).to(dtype))
