"""Latent attention (MLA): a token's latent key, normalised, rotated and written into its page."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import PerToken
from .declare import check, composite, operator
from .norm import rms_norm

NARROW = (torch.float32, torch.bfloat16, torch.float16)


@operator(
    "latent_key(Tensor kv, Tensor weight, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_cache, Tensor(b!) ckv_cache, float eps) "
    "-> (Tensor, Tensor)",
    batch=PerToken(("kv", "cos", "sin", "slots")),
)
def latent_key(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, ckv_cache: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Keys of latent attention, kv [T, L + R]: the first L elements normalised, the other R rotated, both written into their caches.

    y = x * rstd * weight with rstd = 1 / sqrt(mean(x * x) + eps) over the first L, weight [L] of any float dtype. Of the other R
    the pair (x[2i], x[2i + 1]) = (a, b) goes to i and i + R / 2, as npu_interleave_rope has it: k[i] = a * cos[i] - b * sin[i],
    k[i + R / 2] = b * cos[i + R / 2] + a * sin[i + R / 2], with cos and sin [T, R] of any float dtype. All of it in float32, and
    each result rounded once. k_cache [pages, page, R] and ckv_cache [pages, page, L], of kv's dtype, get row t at the slot slots[t] (int32 or
    int64): number slots[t] % page of the page slots[t] // page. A negative slot is not written; the others differ from each other.

    Returns k [T, R] and y [T, L], contiguous, in kv's dtype: float32, bfloat16 or float16. It is the one operator of this package
    that writes into its arguments: what it returns does not depend on what was in them.

    The sum over L has the order of `bi_compile::sum`. On a CPU y is `rms_norm`'s, with its roundings, and each product of
    the rotation is rounded; an NPU's kernel fuses one of the two into their sum, which is the same where operands have 16 bits.
    A slot beyond the cache is an IndexError on a CPU; on a device it is read there and not checked.
    """
    name = "bi_compile::latent_key"
    check(
        kv.dtype in NARROW and weight.is_floating_point() and cos.is_floating_point() and sin.is_floating_point(),
        lambda: (
            f"{name} has no kernel for {kv.dtype}: use float32, bfloat16 or float16, and a weight, cos and sin of a float dtype"
        ),
    )
    check(
        kv.dim() == cos.dim() == sin.dim() == 2
        and weight.dim() == slots.dim() == 1
        and kv.shape[1] == weight.shape[0] + cos.shape[1]
        and cos.shape[1] % 2 == 0
        and cos.shape == sin.shape
        and cos.shape[0] == slots.shape[0] == kv.shape[0]
        and slots.dtype in (torch.int32, torch.int64),
        lambda: (
            f"{name} takes kv [T, L + R], weight [L], cos and sin [T, R], R even, and a slot for each of T, int32 or int64, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (kv, weight, cos, sin, slots))
        ),
    )
    check(
        k_cache.dim() == ckv_cache.dim() == 3
        and k_cache.shape[:2] == ckv_cache.shape[:2]
        and (k_cache.shape[2], ckv_cache.shape[2]) == (cos.shape[1], weight.shape[0])
        and k_cache.dtype == ckv_cache.dtype == kv.dtype
        and k_cache.stride(2) == ckv_cache.stride(2) == 1,
        lambda: (
            f"{name} takes caches [pages, page, {cos.shape[1]}] and [pages, page, {weight.shape[0]}] of {kv.dtype}, rows contiguous, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype} {t.stride()}" for t in (k_cache, ckv_cache))
        ),
    )
    return kv.new_empty(kv.shape[0], cos.shape[1]), kv.new_empty(kv.shape[0], weight.shape[0])


@composite("latent_key")
def _latent_key(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, ckv_cache: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    latent_key.meta(kv, weight, cos, sin, slots, k_cache, ckv_cache, eps)
    latent, pairs = kv.split([weight.shape[0], cos.shape[1]], 1)
    y = rms_norm(latent, weight, eps)[0]
    a, b = pairs.float().unflatten(1, (-1, 2)).unbind(2)
    (cos_a, cos_b), (sin_a, sin_b) = (x.float().chunk(2, 1) for x in (cos, sin))
    k = torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b], 1).to(kv.dtype)
    there = (slots >= 0).nonzero().flatten()
    page = k_cache.shape[1]
    for cache, rows in ((k_cache, k), (ckv_cache, y)):
        at = slots[there].long()
        cache[at // page, at % page] = rows[there]
    return k, y
