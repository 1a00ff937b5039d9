"""Latent attention (MLA): a token's key, a program for each, and the product whose rows come first.

For an NPU alone, whose libraries have both as one operator. Elsewhere they are computed as they are defined (`bi_compile.ops`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bi_compile import ops

from ..triton.launch import aligned, as_rows, cdiv, choose, index_type, launch, loads_transposed, row_stride, target
from ..triton.matmul import product_tile
from ..triton.output_tile import GROUP_SIZE_M
from ..triton.reduce import divide, load_rows, program_rows, store_rows
from ..triton.tiles import PRODUCT, PRODUCT_K, ROWS


@triton.jit(do_not_specialize=["T"])
def _latent_key(
    kv, weight, cos, sin, slots, k_cache, ckv_cache, k, y, T, L, HALF, page, stride_kv, stride_cos, stride_sin,
    stride_kp, stride_kn, stride_cp, stride_cn, EPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One token: its L squares in lanes, then one `tl.sum`, as `norm._rms_norm` takes a row; then its HALF pairs, each by itself."""
    rows = program_rows(1)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    to_cache = tl.where(slot < 0, 0, L)
    half_to_cache = tl.where(slot < 0, 0, HALF)

    cols = tl.arange(0, BLOCK_L)
    value = load_rows(kv, stride_kv, rows, 0, T, L, 0.0, BLOCK_L, tl.float32)
    total = tl.sum(tl.fma(value, value, tl.zeros((1, BLOCK_L), tl.float32)), 1)
    scale = tl.rsqrt(divide(total, tl.full((1,), L, tl.float32)) + tl.full((1,), EPS, tl.float32))
    scaled = value * scale[:, None] * tl.load(weight + cols, mask=cols < L, other=0.0).to(tl.float32)[None, :]
    store_rows(y, scaled, rows, 0, T, L, BLOCK_L)
    latent = ckv_cache + slot // page * stride_cp + slot % page * stride_cn
    tl.store(latent + cols[None, :], scaled.to(y.dtype.element_ty), mask=(cols < to_cache)[None, :])

    half = tl.arange(0, BLOCK_H)
    inside = half < HALF
    pairs = kv + token * stride_kv + L
    a = tl.load(pairs + 2 * half, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pairs + 2 * half + 1, mask=inside, other=0.0).to(tl.float32)
    rotated = k_cache + slot // page * stride_kp + slot % page * stride_kn
    for second in tl.static_range(2):
        at = half + second * HALF
        c = tl.load(cos + token * stride_cos + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * stride_sin + at, mask=inside, other=0.0).to(tl.float32)
        # explicit: left to the compiler, product and sum might be fused or not
        if second:
            turned = tl.fma(b, c, a * s).to(k.dtype.element_ty)
        else:
            turned = tl.fma(a, c, -(b * s)).to(k.dtype.element_ty)
        tl.store(k + token * 2 * HALF + at, turned, mask=inside)
        tl.store(rotated + at, turned, mask=half < half_to_cache)


@triton.jit(do_not_specialize=["M"])
def _product_transposed(
    a, b, out, M, N, K, stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn, stride_out,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE_M: tl.constexpr,
):  # fmt: skip
    """out[m, batch] = a[batch, m] @ b[batch]: `matmul.product_tile`; the rows of out are stride_out apart."""
    batch, offs_m, offs_n, acc = product_tile(
        a, b, M, N, K, stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn,
        A_TRANSPOSED, B_TRANSPOSED, INDEX, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_SIZE_M,
    )  # fmt: skip
    out_ptrs = out + batch * N + offs_m[:, None] * stride_out + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def latent_key(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, ckv_cache: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.latent_key`; the order of the sum: `_latent_key`."""
    k, y = outs = ops.latent_key.meta(kv, weight, cos, sin, slots, k_cache, ckv_cache, eps)
    length, widest = y.shape[1], ROWS[target(kv)][0]
    if max(length, k.shape[1]) > widest:
        raise NotImplementedError(
            f"bi_compile::latent_key: a program holds up to {widest} elements of a latent key on {kv.device}, not {length} and "
            f"{k.shape[1]} rotated ones"
        )
    rows, cos, sin = (as_rows(x, x.shape[1]) for x in (kv, cos, sin))
    launch(
        _latent_key, kv.shape[0], kv, rows, aligned(weight.contiguous()), cos, sin, aligned(slots.contiguous()), k_cache, ckv_cache, k, y,
        kv.shape[0], length, k.shape[1] // 2, k_cache.shape[1], *map(row_stride, (rows, cos, sin)), *k_cache.stride()[:2], *ckv_cache.stride()[:2],
        EPS=eps, BLOCK_L=triton.next_power_of_2(length), BLOCK_H=triton.next_power_of_2(k.shape[1] // 2), num_warps=4,
    )  # fmt: skip
    return outs


def bmm_transposed(a: Tensor, b: Tensor) -> Tensor:
    """See `bi_compile.ops.bmm_transposed`; the order of the sum: `matmul.product`."""
    out = ops.bmm_transposed.meta(a, b)
    if out.numel() == 0:
        return out
    m, batches, n = out.shape
    size, tile = a.element_size(), choose(PRODUCT[target(a)][a.element_size()], m)
    launch(
        _product_transposed, batches * cdiv(m, tile.height) * cdiv(n, tile.width), a, a, b, out, m, n, a.shape[2],
        *a.stride(), *b.stride(), batches * n,
        A_TRANSPOSED=loads_transposed(a), B_TRANSPOSED=loads_transposed(b), INDEX=index_type(a, b, out),
        BLOCK_M=tile.height, BLOCK_N=tile.width, BLOCK_K=PRODUCT_K[target(a)][size], GROUP_SIZE_M=GROUP_SIZE_M,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"latent_key": latent_key, "bmm_transposed": bmm_transposed}
