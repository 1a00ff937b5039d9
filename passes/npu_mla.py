"""Ascend's fused operators of latent attention (MLA): norm, rotation and cache write of a latent key; the product with values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, given, refuse

#: cache_mode -> whether the caches are [pages, page, heads, D] and rows go to slots
PAGED = {"PA": True, "PA_BNSD": True, "Norm": False, "PA_NZ": False, "PA_BLK_BNSD": False, "PA_BLK_NZ": False}


class NpuMla(Pass):
    """Norm, rotation and cache write of latent attention, and the product that goes with a transposition."""

    name = "npu_mla"
    source = "vllm_ascend/attention/mla_v1.py calls it between the compiled graphs; torch_npu 2.13's documentation says what it computes"


@NpuMla.replaces("npu.npu_kv_rmsnorm_rope_cache.default", why="a row sum in a fused kernel")
def kv_rmsnorm_rope_cache(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, *,
    k_rope_scale: Tensor | None = None, c_kv_scale: Tensor | None = None, k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None, v: Tensor | None = None, epsilon: float = 1e-5, cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """kv [B, 1, S, L + R]: rms_norm of the first L, rotation of the rest, both written to the slots `index`.

    Returns the caches and both results. Rows whose slot is negative are not written, as by the native operator.
    """
    named = given({
        "k_rope_scale": k_rope_scale, "c_kv_scale": c_kv_scale, "k_rope_offset": k_rope_offset, "c_kv_offset": c_kv_offset, "v": v,
    })  # fmt: skip
    if not PAGED.get(cache_mode, False):
        named.append(f"cache_mode={cache_mode!r}")
    if kv.shape[1] != 1 or k_cache.shape[2] != 1:
        named.append(f"{kv.shape[1]} heads of keys")
    if named:
        refuse("npu_kv_rmsnorm_rope_cache", named, 'it has one for cache_mode "PA", one head and no quantisation')
    rows, cos, sin = (x.reshape(-1, x.shape[-1]) for x in (kv, cos, sin))
    k, y = ops.latent_key(rows, gamma, cos, sin, index.reshape(-1), k_cache.squeeze(2), ckv_cache.squeeze(2), epsilon)
    return k_cache, ckv_cache, k.view(*kv.shape[:-1], -1), y.view(*kv.shape[:-1], -1)


@NpuMla.replaces("npu.npu_transpose_batchmatmul.default", why="the product's tiling follows the number of rows")
def transpose_batchmatmul(
    input: Tensor, weight: Tensor, *, bias: Tensor | None = None, scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None, perm_x2: Sequence[int] | None = None, perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:  # fmt: skip
    """(input with its dimensions in the order perm_x1) @ (weight in perm_x2), in the order perm_y, which is (1, 0, 2) by default."""
    named = given({"bias": bias, "scale": scale, "batch_split_factor": batch_split_factor}, {"batch_split_factor": 1})
    if named:
        refuse("npu_transpose_batchmatmul", named, "it has one for the plain product")
    a, b = input.permute(*(perm_x1 or (0, 1, 2))), weight.permute(*(perm_x2 or (0, 1, 2)))
    order = tuple(perm_y or (1, 0, 2))
    return ops.bmm_transposed(a, b) if order == (1, 0, 2) else ops.bmm(a, b).permute(*order).contiguous()
