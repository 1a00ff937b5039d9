"""Paged attention is attention of each request alone, to the bit, wherever its keys lie and whoever else is there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cpu_cases import each_dtype, rand, same, threads
from torch import Tensor

from bi_compile import ops
from bi_compile.passes import CpuAttention
from bi_compile.table import Entry

HEADS, KV_HEADS, HEAD, VALUE = 6, 2, 40, 24
#: (tokens, keys): decode, prefill, chunks, a request without tokens, one without keys, more tokens than keys
MIXED = [(1, 300), (5, 5), (1, 1), (17, 64), (0, 9), (3, 0), (1, 128), (9, 129), (4, 2), (70, 90), (2, 1500)]
#: keys that a query sees to its left and right
LIMITS = [(None, 0), (None, None), (16, 0), (0, 0), (3, 5), (1100, 0)]
Request = tuple[Tensor, Tensor, Tensor]


def request_of(index: int, tokens: int, keys: int, dtype: torch.dtype) -> Request:
    sizes = ((tokens, HEADS, HEAD), (keys, KV_HEADS, HEAD), (keys, KV_HEADS, VALUE))
    q, k, v = (rand(*size, dtype=dtype, seed=3 * index + i) for i, size in enumerate(sizes))
    return q, k, v


def alone(request: Request, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
    q, k, _ = request
    distance = torch.arange(len(k))[None] - torch.arange(len(k) - len(q), len(k))[:, None]
    seen = (distance >= -(10**6 if left is None else left)) & (distance <= (10**6 if right is None else right))
    out, lse = ops.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in request), seen)
    return out[0].transpose(0, 1), lse[0].t()


def in_pages(requests: list[Request], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the block table: pages of `size` in any order; what no request has is NaN."""
    counts = [-(-len(k) // size) for _, k, _ in requests]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(size))[: sum(counts)].split(counts)
    table = torch.zeros(len(requests), max(counts) + 1, dtype=torch.int32)
    caches = [requests[0][0].new_full((sum(counts) + 2, KV_HEADS, size, n), math.nan) for n in (HEAD, VALUE)]
    for i, (pages, request) in enumerate(zip(order, requests, strict=True)):
        table[i, : len(pages)] = pages
        for cache, x in zip(caches, request[1:], strict=True):
            for j, page in enumerate(pages.tolist()):
                part = x[j * size : (j + 1) * size]
                cache[page, :, : len(part)] = part.transpose(0, 1)
    return caches[0].transpose(1, 2), caches[1].transpose(1, 2), table


def lengths(requests: list[Request], ends: bool = False) -> Tensor:
    tokens, keys = ([len(r[i]) for r in requests] for i in (0, 1))
    counts = list(itertools.accumulate(keys)) if ends else keys
    return torch.tensor([list(itertools.accumulate(tokens)), counts], dtype=torch.int32)


def paged(requests: list[Request], size: int | None, **given: Any) -> tuple[Tensor, Tensor]:
    """size: of a page; None: the keys in one piece."""
    query = torch.cat([q for q, _, _ in requests])
    if size is None:
        k, v = (torch.cat([r[i] for r in requests]) for i in (1, 2))
        return ops.paged_attention(query, k, v, lengths(requests, ends=True), **given)
    key, value, table = in_pages(requests, size)
    return ops.paged_attention(query, key, value, lengths(requests), table, **given)


@each_dtype
@pytest.mark.parametrize("size", [16, 32, 128, 7, None])
def test_each_request_has_the_bits_that_it_has_alone(dtype: torch.dtype, size: int | None) -> None:
    requests = [request_of(i, *sizes, dtype) for i, sizes in enumerate(MIXED)]
    for left, right in LIMITS:
        want = [torch.cat(x) for x in zip(*(alone(r, left, right) for r in requests), strict=True)]
        assert same(paged(requests, size, left=left, right=right), want), (left, right)
    with threads(1):
        assert same(paged(requests, size, left=left, right=right), want)


@each_dtype
def test_chunks_of_a_prompt_have_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    q, k, v = request_of(0, 200, 200, dtype)
    want = paged([(q, k, v)], 32, right=0)
    for step in (1, 64, 77):
        for end in range(step, 201, step):
            found = paged([(q[end - step : end], k[:end], v[:end])], 16, right=0)
            assert same(found, [x[end - step : end] for x in want]), (step, end)


def test_many_heads_share_one_key_head() -> None:
    """As in latent attention, whose rotated part is kept apart."""
    q, k, v = (
        rand(*size, dtype=torch.bfloat16, seed=i) for i, size in enumerate(((5, 129, 40), (33, 1, 40), (33, 1, 24)))
    )
    found = ops.paged_attention(q, k, v, torch.tensor([[5], [33]], dtype=torch.int32), right=0)
    assert same(found, alone((q, k, v), None, 0))
    parts = {"query_rope": q[..., 32:].contiguous(), "key_rope": k[..., 32:].contiguous()}
    q, k = q[..., :32], k[..., :32]
    assert same(ops.paged_attention(q, k, v, torch.tensor([[5], [33]], dtype=torch.int32), right=0, **parts), found)


@pytest.mark.parametrize("extra", ["softcap", "alibi_slopes", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_added_to_the_scores(dtype: torch.dtype, extra: str) -> None:
    """Right, and each request as alone."""
    requests = [request_of(i, *sizes, dtype) for i, sizes in enumerate(MIXED) if sizes[0] <= sizes[1]]
    given = {"softcap": 2.0, "alibi_slopes": rand(HEADS, seed=7), "sinks": rand(HEADS, seed=8)}
    out, lse = paged(requests, 16, right=0, **{extra: given[extra]})
    at = 0
    for request in requests:
        rows = slice(at, at := at + len(request[0]))
        for size in (16, 128, None):
            assert same(paged([request], size, right=0, **{extra: given[extra]}), (out[rows], lse[rows]))
        q, k, v = (x.double().transpose(0, 1) for x in request)
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
        score = q @ k.transpose(1, 2) / math.sqrt(HEAD)
        distance = torch.arange(len(k[0]))[None] - torch.arange(len(k[0]) - len(q[0]), len(k[0]))[:, None]
        if extra == "softcap":
            score = 2.0 * torch.tanh(score / 2.0)
        if extra == "alibi_slopes":
            score = score + given["alibi_slopes"].double()[:, None, None] * distance
        score = score.masked_fill(distance > 0, -math.inf)
        if extra == "sinks":
            score = torch.cat([score, given["sinks"].double()[:, None, None].expand(-1, len(q[0]), 1)], -1)
            v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        want = (score.softmax(-1) @ v).transpose(0, 1)
        close = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(out[rows].double(), want, atol=close, rtol=close)
        torch.testing.assert_close(lse[rows].double(), score.logsumexp(-1).t(), atol=close, rtol=close)


def test_a_page_or_length_that_does_not_exist_is_an_error() -> None:
    requests = [request_of(0, 3, 40, torch.float32)]
    key, value, table = in_pages(requests, 16)
    for bad in (-1, len(key)):
        wrong = table.clone()
        wrong[0, 1] = bad
        with pytest.raises(IndexError, match=f"block_table names page {bad} for key 16 of request 0"):
            ops.paged_attention(requests[0][0], key, value, lengths(requests), wrong)
    for sizes in ([[3], [-1]], [[4], [40]], [[3], [65]]):
        with pytest.raises(IndexError, match="request 0 has"):
            ops.paged_attention(requests[0][0], key, value, torch.tensor(sizes, dtype=torch.int32), table)


@pytest.mark.parametrize("entry", CpuAttention.entries, ids=lambda e: e.operator)
def test_8_bit_keys_stay_with_vllm_however_they_are_asked_for(entry: Entry) -> None:
    """vLLM gives kv_cache_dtype by its place."""
    assert entry.unless is not None
    assert entry.unless(None, "amx", 1.0, 1.0, "fp8_e4m3") and entry.unless(None, kv_cache_dtype="fp8")
    assert not entry.unless(None, "amx", 1.0, 1.0, "auto") and not entry.unless(None)
