"""Attention: a query's bits are its own, masks, rows without a key, values that are not finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import each_dtype, layouts, no_worse, rand, same, threads
from torch import Tensor

from bi_compile import ops


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


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_no_less_accurate_than_torch(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (rand(2, 4, n, 64, dtype=dtype, seed=i) for i, n in enumerate((100, 130, 130)))
    native = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    no_worse("attention", ops.scaled_dot_product_attention(q, k, v, None, causal)[0], native, exact, dtype)
