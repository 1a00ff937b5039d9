"""Paged attention is attention of each request alone, to the bit, wherever its keys lie and whoever else is there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_cases import CUDA, DEVICE, FLOATS, Outputs, call, draw, same

from bi_compile.kernels.triton import launch, paged_attention, running_softmax

HEADS, KV_HEADS, HEAD = 4, 2, 16
#: (tokens, keys): decode, prefill, chunks, a request without tokens, one without keys, more tokens than keys
MIXED = [(1, 300), (5, 5), (1, 1), (17, 64), (0, 9), (3, 0), (1, 128), (9, 129), (4, 2), (33, 65)]


@pytest.fixture(params=["npu"] if not CUDA else ["cuda"], autouse=True)
def tiles_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: an NPU's tiles."""
    monkeypatch.setattr(launch, "HOST", request.param)


def request_of(index: int, tokens: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [tokens, H, D], keys and values [keys, Hkv, D]."""
    q = draw(tokens, HEADS, HEAD, dtype=dtype, seed=3 * index, scale=0.5)
    k, v = (draw(keys, KV_HEADS, HEAD, dtype=dtype, seed=3 * index + i, scale=0.5) for i in (1, 2))
    return q, k, v


def alone(q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None) -> Outputs:
    """The operator for keys in one piece, for the request by itself."""
    distance = torch.arange(len(k))[None] - torch.arange(len(k) - len(q), len(k))[:, None]
    seen = (distance >= -(10_000 if left is None else left)) & (distance <= (10_000 if right is None else right))
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = call("scaled_dot_product_attention", *heads, seen.to(DEVICE))
    return out[0].transpose(0, 1).contiguous(), lse[0].t().contiguous()


def in_pages(requests: list[tuple[Tensor, Tensor, Tensor]], size: int, seed: int = 0) -> tuple[Any, ...]:
    """Arguments with the keys in pages of `size` in any order; what no request has is NaN."""
    counts = [-(-len(k) // size) for _, k, _ in requests]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed))[: sum(counts)].split(counts)
    table = torch.zeros(len(requests), max(counts) + 1, dtype=torch.int32)
    caches = [requests[0][0].new_full((sum(counts) + 2, size, KV_HEADS, HEAD), math.nan) for _ in range(2)]
    for i, (pages, request) in enumerate(zip(order, requests, strict=True)):
        table[i, : len(pages)] = pages
        for cache, x in zip(caches, request[1:], strict=True):
            for j, page in enumerate(pages.tolist()):
                part = x[j * size : (j + 1) * size]
                cache[page, : len(part)] = part
    return *caches, table.to(DEVICE)


def lengths(requests: list[tuple[Tensor, Tensor, Tensor]], ends: bool = False) -> Tensor:
    tokens, keys = ([len(r[i]) for r in requests] for i in (0, 1))
    return torch.tensor(
        [list(itertools.accumulate(tokens)), list(itertools.accumulate(keys)) if ends else keys],
        dtype=torch.int32, device=DEVICE,
    )  # fmt: skip


def paged(requests: list[tuple[Tensor, Tensor, Tensor]], size: int, **limits: Any) -> Outputs:
    key, value, table = in_pages(requests, size)
    query = torch.cat([q for q, _, _ in requests])
    return call("paged_attention", query, key, value, lengths(requests), table, **limits)


LIMITS: dict[str, dict[str, int | None]] = {
    "causal": {"left": None, "right": 0}, "all keys": {"left": None, "right": None}, "window": {"left": 70, "right": 0},
    "band": {"left": 3, "right": 2},
}  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtype", FLOATS if CUDA else (torch.float32, torch.bfloat16), ids=str)
def test_a_mixed_batch_has_the_bits_of_each_request_alone(dtype: torch.dtype, limits: dict[str, int | None]) -> None:
    """In pages of 16 (less than a tile of keys), 128 (two) and 24 (neither), and packed; with its keys in one piece."""
    requests = [request_of(i, *n, dtype) for i, n in enumerate(MIXED)]
    want = tuple(torch.cat(parts) for parts in zip(*(alone(*r, **limits) for r in requests), strict=True))
    for size in (16, 128, 24):
        assert same(paged(requests, size, **limits), want), size
    query, key, value = (torch.cat(x) for x in zip(*requests, strict=True))
    assert same(call("paged_attention", query, key, value, lengths(requests, ends=True), **limits), want)
    for order in (range(len(requests))[::-1], [3], [7, 1]):
        some = [requests[i] for i in order]
        parts = [[x.split([n for n, _ in MIXED])[i] for i in order] for x in want]
        assert same(paged(some, 16, **limits), tuple(map(torch.cat, parts))), order


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_segments_end_at_the_same_keys_in_pages(limits: dict[str, int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's tiles: segments of 64 keys, then of 128 and 256, taken by one program or by one each."""
    monkeypatch.setattr(launch, "HOST", "cuda")
    monkeypatch.setattr(running_softmax, "SEGMENT", 64)
    monkeypatch.setattr(running_softmax, "AHEAD", 4)
    counts = [(1, 300), (17, 64), (9, 129), (4, 700), (1, 2100)]
    requests = [request_of(i, *n, torch.float16) for i, n in enumerate(counts)]
    want = tuple(torch.cat(parts) for parts in zip(*(alone(*r, **limits) for r in requests), strict=True))
    for few, size in ((0, 16), (0, 128), (10**6, 128)):
        monkeypatch.setattr(running_softmax, "FEW", few)
        assert same(paged(requests, size, **limits), want), (few, size)


@pytest.fixture
def products_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are a library's, whose order follows the rows; here the elements of K are added ascending."""

    def matmul(a: Any, b: Any, dtype: Any) -> Any:
        return np.add.reduce((a[:, :, None] * b[None]).astype(dtype), 1)

    if not CUDA:
        monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("products_in_one_order")
@pytest.mark.parametrize(
    ("counts", "behind", "which"),
    [
        (MIXED, 40, [paged_attention.LONG, paged_attention.SHORT]),
        ([(1, 300), (8, 64), (0, 9), (1, 0), (3, 129)], 40, [paged_attention.SHORT]),
        ([(8, 64), (1, 100)], 0, [paged_attention.SHORT]),
        ([(40, 140)], 1, [paged_attention.ALL]),
    ],
)
def test_who_takes_a_request_changes_no_bits(
    counts: list[tuple[int, int]], behind: int, which: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CUDA's tiles: where the longest request is known, long and short ones are launched apart; tokens behind the last give zero."""
    monkeypatch.setattr(launch, "HOST", "cuda")
    monkeypatch.setattr(paged_attention, "MANY", 8)
    requests = [request_of(i, *n, torch.float16) for i, n in enumerate(counts)]
    key, value, table = in_pages(requests, 64)
    query = torch.cat([*(q for q, _, _ in requests), draw(behind, HEADS, HEAD, dtype=torch.float16)])
    longest = max(n for n, _ in counts)
    chosen = paged_attention.launches_for(query, len(counts), KV_HEADS, HEADS // KV_HEADS, HEAD, longest)
    assert [w for w, _ in chosen] == which
    results = []
    for known in (None, longest):
        outs = torch.full_like(query, math.nan), query.new_full(query.shape[:-1], math.nan, dtype=torch.float32)
        ends, keys = lengths(requests)
        results.append(paged_attention.fill(outs, query, key, value, ends, keys, table, right=0, longest=known))
    assert same(*results)
    tokens = len(query) - behind
    assert not results[1][0][tokens:].any() and (results[1][1][tokens:] == -math.inf).all()


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 300])
def test_every_length_has_its_bits_in_every_page(size: int, keys: int) -> None:
    """Decode, a chunk and a whole prompt (up to 40 tokens) of one length, behind another request."""
    requests = [request_of(i, n, keys, torch.float16) for i, n in enumerate((1, min(3, keys), min(40, keys)))]
    results = [part.split([len(q) for q, _, _ in requests]) for part in paged([*requests], size, right=0)]
    for i, request in enumerate(requests):
        assert same((results[0][i], results[1][i]), alone(*request, None, 0))


def test_tokens_behind_the_last_request_give_zero() -> None:
    requests = [request_of(i, *n, torch.float32) for i, n in enumerate([(2, 20), (1, 9)])]
    key, value, table = in_pages(requests, 16)
    query = torch.cat([*(q for q, _, _ in requests), draw(40, HEADS, HEAD)])
    out, lse = call("paged_attention", query, key, value, lengths(requests), table, right=0)
    assert same((out[:3].contiguous(), lse[:3].contiguous()), paged(requests, 16, right=0))
    assert not out[3:].any() and (lse[3:] == -math.inf).all()
    nobody = torch.zeros(2, 0, dtype=torch.int32, device=DEVICE)
    out, lse = call("paged_attention", query, key, value, nobody, table[:0])
    assert not out.any() and (lse == -math.inf).all()
    empty = call("paged_attention", query[:0], key, value, lengths(requests) * 0, table)
    assert [tuple(x.shape) for x in empty] == [(0, HEADS, HEAD), (0, HEADS)]


def test_a_cache_in_other_strides_has_the_same_bits() -> None:
    """Key and value as slices of one cache, heads before pages, and a query cut out of a product's output."""
    requests = [request_of(i, *n, torch.float16) for i, n in enumerate(MIXED[:4])]
    key, value, table = in_pages(requests, 128)
    query = torch.cat([q for q, _, _ in requests])
    want = call("paged_attention", query, key, value, lengths(requests), table, right=0)
    both = torch.stack([key, value])
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    wide = torch.cat([query, query], -1)[..., :HEAD]
    wider = torch.nn.functional.pad(table, (0, 7))[:, : table.shape[1]]
    assert same(call("paged_attention", query, both[0], both[1], lengths(requests), table, right=0), want)
    assert same(call("paged_attention", wide, *heads_first, lengths(requests), wider, right=0), want)


@pytest.mark.parametrize("size", [16, 128])
def test_a_rotated_part_kept_apart(size: int) -> None:
    """Latent attention (MLA): one key head, whose values are its keys. The bits of the request alone; near the scores of the
    parts joined, whose sum over D + Dr is another."""
    requests = [request_of(i, *n, torch.float16) for i, n in enumerate(MIXED)]
    key, value, table = in_pages(requests, size)
    query = torch.cat([q for q, _, _ in requests])
    parts = {"query_rope": draw(*query.shape[:2], 8, dtype=query.dtype, seed=90), "key_rope": value[..., :8]}
    got = call("paged_attention", query, key, key, lengths(requests), table, right=0, scale=0.2, **parts)
    start = 0
    for i, (tokens, _) in enumerate(MIXED):
        rows = slice(start, start + tokens)
        one = parts | {"query_rope": parts["query_rope"][rows]}
        alone = call(
            "paged_attention",
            query[rows],
            key,
            key,
            lengths(requests[i : i + 1]),
            table[i : i + 1],
            right=0,
            scale=0.2,
            **one,
        )
        assert same(alone, tuple(x[rows] for x in got)), i
        start += tokens
    joined = torch.cat([query, parts["query_rope"]], -1), torch.cat([key, parts["key_rope"]], -1)
    out, lse = call("paged_attention", *joined, key, lengths(requests), table, right=0, scale=0.2)
    torch.testing.assert_close((got[0].float(), got[1]), (out.float(), lse), atol=2e-3, rtol=2e-3)
    with pytest.raises(RuntimeError, match="query_rope and key_rope are given together"):
        call("paged_attention", query, key, key, lengths(requests), table, query_rope=parts["query_rope"])


@pytest.mark.skipif(CUDA, reason="an NPU's tiles")
@pytest.mark.parametrize(
    ("head", "size", "words"), [(640, 128, "640"), (512, 24, "use pages of a multiple of 64 keys")]
)
def test_heads_that_no_tile_holds_are_refused(head: int, size: int, words: str) -> None:
    """By name and before anything is launched; so is a page size that leaves heads no room."""
    query, cache = torch.zeros(1, 1, head, dtype=torch.float16), torch.zeros(1, size, 1, head, dtype=torch.float16)
    numbers = torch.ones(2, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=rf"bi_compile::paged_attention.*{words}"):
        call("paged_attention", query, cache, cache, numbers, torch.zeros(1, 1, dtype=torch.int32))
