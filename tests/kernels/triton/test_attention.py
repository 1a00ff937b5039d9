"""Attention: right, and a query's bits are its own in every tile of the tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton_cases import (
    CUDA,
    DEVICE,
    FLOATS,
    HALVES,
    ROUNDED,
    Outputs,
    call,
    check,
    draw,
    same,
    statistic,
)

from bi_compile.kernels.triton import launch
from bi_compile.kernels.triton import running_softmax as module
from bi_compile.kernels.triton.attention import attention
from bi_compile.kernels.triton.tiles import ATTENTION, Tile


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Outputs:
    """Output and logsumexp by PyTorch."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    wide = q.to(statistic(q)) / math.sqrt(q.shape[3])
    scores = wide @ k.to(wide.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)
    return out, torch.logsumexp(scores, -1)


def heads(batch: int, count: int, length: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[B, H, L, D] as a model has it: a view of [B, L, H, D]."""
    return draw(batch, length, count, dim, dtype=dtype, seed=seed, scale=0.5).transpose(1, 2)


#: batch, query heads, key heads, queries, keys, D, Dv
ATTENTIONS = [
    (2, 2, 1, 5, 70, 16, 16),
    (1, 4, 4, 33, 33, 24, 40),
    (1, 6, 2, 1, 129, 64, 64),
    (1, 1, 1, 3, 0, 16, 16),
    (2, 2, 2, 0, 5, 16, 16),
]

#: with each dtype, where it does not take long in the interpreter
ATTENTIONS_IN = [(c, t) for c in ATTENTIONS for t in ROUNDED if CUDA or t != torch.float64 or c[3] * c[4] <= 400]


@pytest.mark.parametrize(("case", "dtype"), ATTENTIONS_IN, ids=str)
def test_attention_is_right(case: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, q_heads, kv_heads, length, keys, dim, value_dim = case
    q = heads(batch, q_heads, length, dim, dtype, 0)
    k, v = heads(batch, kv_heads, keys, dim, dtype, 1), heads(batch, kv_heads, keys, value_dim, dtype, 2)
    args = q, k, v
    if keys == 0:
        out, lse = call("scaled_dot_product_attention", *args)
        assert not out.any() and (lse == -math.inf).all()
        return
    boolean = draw(length, keys) > -1
    boolean[:, 0] = True
    for mask in (None, boolean, draw(batch, 1, length, keys, dtype=dtype)):
        check("scaled_dot_product_attention", attend, *args, mask, False)
    check("scaled_dot_product_attention", attend, *args, None, True)
    ours = call("scaled_dot_product_attention", *args, scale=0.0)[0]
    average = v.double().mean(2, True).repeat_interleave(q_heads // kv_heads, 1).expand_as(ours)
    torch.testing.assert_close(ours, average.to(dtype), atol=1e-2, rtol=1e-2)


def test_a_query_without_keys_gives_zero() -> None:
    q, k, v = (heads(1, 2, 5, 16, torch.float32, seed) for seed in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    for m in (mask, torch.zeros(5, 5, device=DEVICE).masked_fill(~mask, -math.inf)):
        out, lse = call("scaled_dot_product_attention", q, k, v, m)
        assert not out[:, :, 2].any() and (lse[:, :, 2] == -math.inf).all() and lse[:, :, :2].isfinite().all()
    q[0, 0, 1] = math.nan
    out, lse = call("scaled_dot_product_attention", q, k, v, None, True)
    assert out[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan() and out[0, 0, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS if CUDA else (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("length", [1, 16, 130, 1000] if CUDA else [40])
def test_a_query_keeps_its_bits_among_others(length: int, dtype: torch.dtype) -> None:
    keys = length + 40
    q = heads(3, 4, length, 48, dtype, 0)
    k, v = heads(3, 2, keys, 48, dtype, 1), heads(3, 2, keys, 48, dtype, 2)
    mask = draw(3, 1, length, keys) > -1

    def ours(*args: Any) -> Outputs:
        return call("scaled_dot_product_attention", *args)

    for causal, m in ((False, None), (True, None), (False, mask), (False, draw(3, 1, length, keys, dtype=dtype))):
        every = ours(q, k, v, m, causal)
        for i in {0, 1, length // 2, length - 1} & set(range(length)):
            for b in (0, 2):
                lone = m[b : b + 1, :, i : i + 1] if m is not None else None
                if causal:
                    lone = (torch.arange(keys, device=DEVICE) <= i).expand(1, 1, 1, keys)
                alone = ours(q[b : b + 1, :, i : i + 1], k[b : b + 1], v[b : b + 1], lone)
                if causal:  # a mask is another kernel: only that other queries do not matter is promised
                    part = ours(*(t[b : b + 1, :, : i + 1] for t in (q, k, v)), None, True)
                    alone = tuple(o[:, :, i : i + 1] for o in part)
                assert same(tuple(o[b : b + 1, :, i : i + 1] for o in every), alone), (causal, m is None, i, b)
    packed = ours(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    assert same(packed, ours(q, k, v, mask.expand(3, 4, -1, -1).contiguous()))
    assert same(packed, ours(q, k, v, mask.expand(3, 4, -1, -1).transpose(2, 3).contiguous().transpose(2, 3)))


def test_keys_behind_the_last_seen_one_do_not_matter() -> None:
    q, k, v = (heads(1, 2, length, 16, torch.float32, seed) for seed, length in enumerate((5, 200, 200)))
    seen = torch.arange(200, device=DEVICE) < 71
    expected = call("scaled_dot_product_attention", q, k, v, seen.expand(5, 200))
    for keys in (71, 100, 130):
        part = call("scaled_dot_product_attention", q, k[:, :, :keys], v[:, :, :keys], seen[:keys].expand(5, keys))
        assert same(part, expected)
    v[:, :, 128:] = math.nan
    assert same(call("scaled_dot_product_attention", q, k, v, seen.expand(5, 200)), expected)


@pytest.mark.parametrize("dtype", FLOATS if CUDA else HALVES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128] if CUDA else [16])
def test_every_tile_of_attention_gives_the_same_bits(dim: int, dtype: torch.dtype) -> None:
    length, keys = (70, 150) if CUDA else (20, 70)
    q, k, v = (heads(1, count, n, dim, dtype, n) for count, n in ((4, length), (2, keys), (2, keys)))
    tiles = [tile for _, tile in ATTENTION["cuda"][dtype.itemsize]]
    if dtype.itemsize == 2:
        tiles += [Tile(16, 64, 4, 2), Tile(32, 64, 4, 1)]
    for causal in (False, True):
        for mask in (None, draw(length, keys) > -1, draw(length, keys, dtype=dtype)):
            results = []
            for tile in tiles:
                outs = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=statistic(q))
                results.append(attention(q, k, v, mask, causal, None, outs, tile))
            for tile, result in zip(tiles, results, strict=True):
                assert same(result, results[0]), tile


def test_the_segments_of_keys() -> None:
    """256 keys up to key 2,048, then 512, from 8,192 on 1,024."""
    ends = [*range(256, 2048, 256), *range(2048, 8192, 512), *range(8192, 40_000, 1024)]
    for keys in (1, 255, 256, 257, 2047, 2048, 2049, 2560, 2561, 8191, 8192, 8193, 9216, 9217, 32_768):
        assert module._segments(keys) == 1 + sum(end < keys for end in ends), keys


@pytest.mark.parametrize("dtype", HALVES if CUDA else HALVES[1:], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256] if CUDA else [16])
def test_segments_have_the_same_bits_whoever_takes_them(
    dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program for all segments of the keys, or one for each of them."""
    every = (255, 256, 257, 600, 2047, 2048, 2049, 2560, 8191, 8193, 9300) if CUDA else (63, 64, 65, 640, 2050)
    if not CUDA:
        monkeypatch.setattr(module, "SEGMENT", 64)
        monkeypatch.setattr(module, "AHEAD", 4)
    for keys in every:
        q, k, v = (heads(1, count, n, dim, dtype, n) for count, n in ((4, 5), (2, keys), (2, keys)))
        mask = draw(5, keys) > -1
        for m, causal in ((None, False), (mask, False), (None, True), (draw(5, keys, dtype=dtype), False)):
            queries = heads(1, 4, keys, dim, dtype, 5) if causal and (CUDA or keys < 200) else q
            results = []
            for few in (0, 10**6):
                monkeypatch.setattr(module, "FEW", few)
                results.append(call("scaled_dot_product_attention", queries, k, v, m, causal))
            assert same(*results), (keys, causal, m is None)
            if not causal:
                assert_near(results[0][0], attend(q.double(), k.double(), v.double(), m, False)[0])


def assert_near(got: Tensor, want: Tensor) -> None:
    assert (got.double() - want).norm() < {torch.float16: 2e-3, torch.bfloat16: 1e-2}[got.dtype] * want.norm()


@pytest.mark.skipif(CUDA, reason="an NPU's tile, in the interpreter")
@pytest.mark.parametrize("group", [1, 2, 3, 4, 64])
def test_an_npu_stores_each_head_where_it_belongs(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By queries and heads, or, for groups of 3, by rows: each head has the bits that it has as the only one."""
    monkeypatch.setattr(launch, "HOST", "npu")
    for length in (1, 3, 33 if group < 64 else 2):
        q, k, v = (heads(2, n, m, 16, torch.float16, m) for n, m in ((2 * group, length), (2, 70), (2, 70)))
        out, lse = call("scaled_dot_product_attention", q, k, v, None, length > 3)
        for head in {0, 1, group, 2 * group - 1} & set(range(2 * group)):
            of_it = head // group
            parts = q[1:, head : head + 1], k[1:, of_it : of_it + 1], v[1:, of_it : of_it + 1]
            alone = call("scaled_dot_product_attention", *parts, None, length > 3)
            assert same((out[1:, head : head + 1], lse[1:, head : head + 1]), alone), (length, head)
