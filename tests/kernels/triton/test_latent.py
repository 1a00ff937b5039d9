"""Latent attention's key and product on an NPU: each token's bits are its own, and go where its slot says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import CUDA, DEVICE, draw, same, shapes_like_the_fake

from bi_compile import ops
from bi_compile.kernels.ascend import triton_kernels
from bi_compile.kernels.triton import launch

pytestmark = pytest.mark.skipif(CUDA, reason="these kernels are for an NPU; on CUDA the definition computes")
KERNELS = triton_kernels()
PAGES, PAGE = 12, 16
#: normalised, rotated
SIZES = [(512, 64), (32, 16), (96, 6), (1, 2)]


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NPU's in the interpreter."""
    monkeypatch.setattr(launch, "HOST", "npu")


def keys(tokens: int, length: int, rotated: int, dtype: torch.dtype) -> list[Tensor]:
    """kv, weight, cos, sin."""
    angles = draw(tokens, rotated, seed=2)
    return [
        draw(tokens, length + rotated, dtype=dtype), draw(length, dtype=dtype, seed=1), angles.cos().to(dtype), angles.sin().to(dtype)
    ]  # fmt: skip


def caches(length: int, rotated: int, dtype: torch.dtype) -> list[Tensor]:
    """k_cache, ckv_cache of NaN."""
    return [torch.full((PAGES, PAGE, n), math.nan, dtype=dtype, device=DEVICE) for n in (rotated, length)]


def slots(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randperm(PAGES * PAGE, generator=torch.Generator().manual_seed(tokens))[:tokens].to(DEVICE, dtype)


def run(kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, at: Tensor, into: list[Tensor]) -> tuple[Tensor, Tensor]:
    return KERNELS["latent_key"](kv, weight, cos, sin, at, *into, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "rotated"), SIZES)
def test_a_key_keeps_its_bits_among_others(length: int, rotated: int, dtype: torch.dtype) -> None:
    """Alone, at every place of batches of several sizes, in views of a wider product, and in both kinds of slots."""
    kv, weight, cos, sin = keys(33, length, rotated, dtype)
    alone = [
        run(kv[i : i + 1], weight, cos[i : i + 1], sin[i : i + 1], slots(1), caches(length, rotated, dtype))
        for i in (0, 5)
    ]
    wide = torch.full((33, length + rotated + 35), math.nan, dtype=dtype, device=DEVICE)
    for count, shift in ((1, 0), (2, 1), (7, 3), (16, 20), (17, 4), (33, 11)):
        for i, want in zip((0, 5), alone, strict=True):
            order = (torch.arange(33) - shift % count + i) % 33
            rows, c, s = (x[order][:count] for x in (kv, cos, sin))
            wide[:count, 19 : 19 + length + rotated] = rows
            for given, kind in ((rows, torch.int64), (wide[:count, 19 : 19 + length + rotated], torch.int32)):
                got = run(given, weight, c, s, slots(count, kind), caches(length, rotated, dtype))
                at = shift % count
                assert same(tuple(x[at : at + 1] for x in got), want), (count, shift, i)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "rotated"), SIZES)
def test_a_key_is_normalised_rotated_and_written(length: int, rotated: int, dtype: torch.dtype) -> None:
    """The norm has the bits of rms_norm, the rotation those of its definition in 16 bits; where no slot names it, a cache stays."""
    given, at, into = keys(20, length, rotated, dtype), slots(20), caches(length, rotated, dtype)
    at[3] = at[11] = -1
    k, y = run(*given, at, into)
    shapes_like_the_fake("latent_key", (k, y), *given, at, *into, 1e-6)
    assert same(y, KERNELS["rms_norm"](given[0][:, :length].contiguous(), given[1], 1e-6)[0])
    defined, others = caches(length, rotated, dtype), [given[0], given[1].float(), *given[2:]]
    by_definition = ops.latent_key(*others, at, *defined, 1e-6)
    exact = ops.latent_key(*(x.float() for x in others), at, *caches(length, rotated, torch.float32), 1e-6)
    if dtype == torch.float16:
        assert same(k, by_definition[0])
    for ours, wanted in zip((k, y), exact, strict=True):
        assert (
            (ours - wanted).abs() <= 2 * torch.finfo(dtype).eps * wanted.abs() + 4e-6 * given[0].float().abs().max()
        ).all()
    there = at >= 0
    for cache, rows in zip(into, (k, y), strict=True):
        flat = cache.view(PAGES * PAGE, -1)
        assert same(flat[at[there]], rows[there])
        assert torch.equal(
            flat.isnan().all(1).nonzero().flatten(), torch.tensor(sorted({*range(PAGES * PAGE)} - {*at.tolist()}))
        )


def test_caches_whose_pages_lie_apart_and_no_tokens() -> None:
    given, at = keys(9, 32, 16, torch.float16), slots(9)
    packed = caches(32, 16, torch.float16)
    want = run(*given, at, packed)
    both = torch.full((PAGES, 2, PAGE, 48), math.nan, dtype=torch.float16, device=DEVICE)
    apart = [both[:, 1, :, 32:], both[:, 0, :, :32]]
    assert same(run(*given, at, apart), want)
    assert all(torch.equal(a.nan_to_num(7), p.nan_to_num(7)) for a, p in zip(apart, packed, strict=True))
    none = run(given[0][:0], given[1], given[2][:0], given[3][:0], at[:0], packed)
    assert [x.shape for x in none] == [(0, 16), (0, 32)]


def test_a_key_that_no_program_holds_is_refused() -> None:
    given = keys(1, 5000, 2, torch.float16)
    with pytest.raises(NotImplementedError, match="latent_key: a program holds up to 4096 elements"):
        run(*given, slots(1), caches(5000, 2, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 8, 8), (4, 1, 64, 16), (4, 33, 130, 70), (3, 70, 1, 5), (16, 17, 128, 128), (2, 3, 0, 4), (2, 0, 8, 4)],
)
def test_a_transposed_product_has_the_bits_of_bmm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """From attention's output as its kernel leaves it, [M, B, K], and from a contiguous copy."""
    batches, m, k, n = shape
    a, b = draw(m, batches, k, dtype=dtype).transpose(0, 1), draw(batches, k, n, dtype=dtype, seed=1)
    want = KERNELS["bmm"](a, b).transpose(0, 1).contiguous()
    operands: list[tuple[Any, Any]] = [(a, b), (a.contiguous(), b), (a, b.mT.contiguous().mT)]
    for x, y in operands:
        found = KERNELS["bmm_transposed"](x, y)
        assert same(found, want)
        shapes_like_the_fake("bmm_transposed", found, x, y)
    if m > 1:
        assert same(KERNELS["bmm_transposed"](a[:, -1:], b), want[-1:])
