"""A TEST BENCH, no part of the product: native operators of latent attention (MLA) and of int8 models, on the CPU's tensors.

Written out after torch_npu 2.13's documentation, and vllm-ascend's kernels where they are open (csrc/moe/moe_gating_top_k). Sums
in floating point are taken in `parts(rows)` parts, as `emulated_npu.Native` does; int8 sums are exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: _C_ascend's, which are not built here
SCHEMAS = (
    "grouped_matmul_swiglu_quant_weight_nz(Tensor x, Tensor weight, Tensor weight_scale, Tensor x_scale, Tensor group_list, *, Tensor? bias=None, Tensor? offset=None, float swiglu_limit=0.0) -> (Tensor output, Tensor output_scale, Tensor output_offset)",
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=True, int quant_mode=0, int swiglu_mode=0, float clamp_limit=0.0, float glu_alpha=1.0, float glu_bias=0.0) -> (Tensor y, Tensor scale)",
)


def _dtype(number: int | None, default: torch.dtype) -> torch.dtype:
    """torch_npu's operators take dtypes as numbers."""
    from torch_npu.op_plugin.meta._meta_registrations import TORCH_DTYPE_ENUM_VALUE_TO_SCALAR_TYPE_MAP as DTYPES

    return default if number is None else DTYPES[number]


def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, N, S, D]: pairs (2i, 2i + 1) go to (i, i + D/2), then x * cos + rotate_half(x) * sin."""
    a = x.float().unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = a.chunk(2, -1)
    return (a * cos.float() + torch.cat([-second, first], -1) * sin.float()).to(x.dtype)


def dynamic_quant(
    input: Tensor, *, smooth_scales: Tensor | None = None, group_index: Tensor | None = None, dst_type: Any = None,
    quant_mode: str = "pertoken", dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each row by its largest element."""
    assert smooth_scales is None and group_index is None and quant_mode == "pertoken"
    scale = input.float().abs().amax(-1) / 127
    return (input.float() / scale.clamp_min(1e-30).unsqueeze(-1)).round().to(torch.int8), scale


class Latent:
    """`native`: an `emulated_npu.Native`, whose products and sums these take."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def kv_rmsnorm_rope_cache(
        self, kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, *,
        epsilon: float = 1e-5, cache_mode: str = "Norm", is_output_kv: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        assert cache_mode == "PA", cache_mode
        latent, rotated = kv.float().split([gamma.shape[0], kv.shape[-1] - gamma.shape[0]], -1)
        square = self.native.sum(latent.square().flatten(0, -2), [1], True).view(*latent.shape[:-1], 1) / gamma.shape[0]
        y = (latent * torch.rsqrt(square + epsilon) * gamma.float()).to(kv.dtype)
        k = interleave_rope(rotated.to(kv.dtype), cos, sin)
        for rows, cache in ((k, k_cache), (y, ckv_cache)):
            flat = cache.view(-1, *cache.shape[2:])
            flat[index[index >= 0]] = rows.reshape(-1, *cache.shape[2:])[: index.numel()][index >= 0]
        return k_cache, ckv_cache, k, y

    def transpose_batchmatmul(
        self, input: Tensor, weight: Tensor, *, perm_x1: Sequence[int] = (0, 1, 2), perm_x2: Sequence[int] = (0, 1, 2),
        perm_y: Sequence[int] = (1, 0, 2), batch_split_factor: int = 1,
    ) -> Tensor:  # fmt: skip
        return self.native.mm(input.permute(*perm_x1), weight.permute(*perm_x2)).permute(*perm_y).contiguous()

    def attention_v2(
        self, query: Tensor, key: Tensor, value: Tensor, *, query_rope: Tensor | None = None, key_rope: Tensor | None = None,
        actual_seq_qlen: Sequence[int] | None = None, actual_seq_kvlen: Sequence[int], num_query_heads: int = 1,
        softmax_scale: float = 1.0, input_layout: str = "BSH", block_size: int = 0, num_key_value_heads: int = 0,
        block_table: Tensor | None = None, sparse_mode: int = 0, workspace: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The layouts BNSD_NBSD and TND_NTD of latent attention, keys in pages [pages, heads, page, D]."""
        if block_table is None:
            raise NotImplementedError("the bench has latent attention in pages alone")
        count, tokens = query.shape[0], query.shape[0]
        if input_layout == "BNSD_NBSD":
            tokens = count * query.shape[2]
            down = lambda x: x.transpose(1, 2).flatten(0, 1)
            ends: Sequence[int] = [query.shape[2] * (i + 1) for i in range(count)]
        elif input_layout == "TND_NTD":
            down, ends = (lambda x: x), actual_seq_qlen or ()
        else:
            raise NotImplementedError(f"the bench has no layout {input_layout}")
        y, lse = self.native.attention(
            down(query), *(c.transpose(1, 2).flatten(2) for c in (key, value)), actual_seq_lengths=ends,
            actual_seq_lengths_kv=actual_seq_kvlen, block_table=block_table, num_heads=num_query_heads, scale=softmax_scale,
            num_key_value_heads=num_key_value_heads, sparse_mode=sparse_mode, block_size=block_size,
            query_rope=None if query_rope is None else down(query_rope),
            key_rope=None if key_rope is None else key_rope.transpose(1, 2).flatten(2),
        )  # fmt: skip
        y = y.view(tokens, num_query_heads, -1).transpose(0, 1)
        return (y.unflatten(1, (count, -1)) if input_layout == "BNSD_NBSD" else y).contiguous(), lse

    def attention_update(
        self, lse: Sequence[Tensor], local_out: Sequence[Tensor], update_type: int
    ) -> tuple[Tensor, Tensor]:
        """Parts of an attention [T, D], each with its logsumexp [T], joined."""
        lse = [x.masked_fill(x == torch.inf, -torch.inf) for x in lse]  # no key
        weights = torch.stack(list(lse)).softmax(0)
        parts = [w[:, None] * torch.nan_to_num(out) for w, out in zip(weights, local_out, strict=True)]
        return torch.stack(parts).sum(0), torch.logsumexp(torch.stack(list(lse)), 0)

    def attention_out(self, attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(*args: Any, out: Sequence[Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
            out[0].copy_(attention(*args, **kwargs)[0].reshape(out[0].shape))
            return out[0], out[1]

        return run

    # -- int8 -----------------------------------------------------------------------------------------------------------

    def quant_matmul(
        self, x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor | None = None, bias: Tensor | None = None,
        output_dtype: Any = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        sums = x1.int() @ x2.int()
        if _dtype(output_dtype, torch.float16) == torch.int32:  # as they are
            return sums
        y = sums.float() * scale.float()
        y = y if pertoken_scale is None else y * pertoken_scale.unsqueeze(-1)
        return (y if bias is None else y + bias.float()).to(_dtype(output_dtype, torch.float16))

    def grouped_matmul(
        self, x: Sequence[Tensor], weight: Sequence[Tensor], *, group_list: Tensor, group_list_type: int = 0,
        scale: Sequence[Tensor] | None = None, per_token_scale: Sequence[Tensor] | None = None, output_dtype: Any = None, **kwargs: Any,
    ) -> list[Tensor]:  # fmt: skip
        """`emulated_npu.Native.grouped_matmul`, and that of int8 with its scales."""
        if x[0].dtype != torch.int8:
            return self.native.grouped_matmul(x, weight, group_list=group_list, group_list_type=group_list_type)
        dtype = _dtype(output_dtype, torch.float16)
        out = x[0].new_zeros(x[0].shape[0], weight[0].shape[2], dtype=dtype)
        for expert, rows in enumerate(_groups(group_list, group_list_type)):
            y = x[0][rows].int() @ weight[0][expert].int()
            if scale is not None and per_token_scale is not None:
                y = y.float() * scale[0][expert].float() * per_token_scale[0][rows, None]
            out[rows] = y.to(dtype)
        return [out]

    def grouped_matmul_swiglu_quant(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor, group_list: Tensor, *, bias: Tensor | None = None,
        offset: Tensor | None = None, swiglu_limit: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """int8 product of each expert (group_list: ends), scaled; silu(gate) * up; each row quantised."""
        assert bias is None and offset is None and not swiglu_limit
        y = torch.zeros(x.shape[0], weight.shape[2])
        for expert, rows in enumerate(_groups(group_list, 0)):
            y[rows] = (
                (x[rows].int() @ weight[expert].int()).float() * weight_scale[expert].float() * x_scale[rows, None]
            )
        gate, up = y.chunk(2, -1)
        return *dynamic_quant(functional.silu(gate) * up), torch.empty(0)


def dequant_swiglu_quant(
    x: Tensor, *, weight_scale: Tensor, activation_scale: Tensor, group_index: Tensor | None = None, activate_left: bool = True,
    quant_mode: int = 0, swiglu_mode: int = 0, clamp_limit: float = 0.0, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """int32 sums, scaled; silu(left half) * right half; each row quantised."""
    assert activate_left and quant_mode == 1 and not clamp_limit and not [v for v in others.values() if v is not None]
    left, right = (x.float() * weight_scale.float() * activation_scale.unsqueeze(-1)).chunk(2, -1)
    return dynamic_quant(functional.silu(left) * right)


def _groups(group_list: Tensor, group_list_type: int) -> list[slice]:
    ends = group_list.cumsum(0) if group_list_type else group_list
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends.tolist()])]


def operators(native: Any) -> dict[str, dict[str, Callable[..., Any]]]:
    """namespace -> operator -> what computes it."""
    latent = Latent(native)
    return {
        "npu": {
            "npu_interleave_rope": interleave_rope, "npu_kv_rmsnorm_rope_cache": latent.kv_rmsnorm_rope_cache,
            "npu_transpose_batchmatmul": latent.transpose_batchmatmul,
            "npu_fused_infer_attention_score_v2": latent.attention_v2,
            "npu_fused_infer_attention_score_v2.out": latent.attention_out(latent.attention_v2),
            "npu_fused_infer_attention_score.out": latent.attention_out(native.attention),
            "_npu_fused_infer_attention_score_get_max_workspace": lambda *_, **__: torch.empty(1),
            "_npu_fused_infer_attention_score_v2_get_max_workspace": lambda *_, **__: torch.empty(1),
            "npu_format_cast": lambda x, *_, **__: x,  # the bench has one format
            "npu_attention_update": latent.attention_update, "npu_dynamic_quant": dynamic_quant,
            "npu_quant_matmul": latent.quant_matmul, "npu_grouped_matmul": latent.grouped_matmul,
        },
        "_C_ascend": {
            "npu_dequant_swiglu_quant": dequant_swiglu_quant,
            "grouped_matmul_swiglu_quant_weight_nz": latent.grouped_matmul_swiglu_quant,
        },
    }  # fmt: skip
