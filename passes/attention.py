"""Scaled dot product attention."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, refuse

aten = torch.ops.aten


def _no_dropout(dropout_p: float) -> None:
    if dropout_p:
        refuse(
            "attention",
            [f"dropout_p={dropout_p}"],
            "which elements drop follows a row's place in the batch; use dropout_p=0 (model.eval())",
        )


def _none(x: Tensor, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """An output that only a backward pass would read."""
    return x.new_zeros(shape, dtype=dtype)


def _four_d(x: Tensor, lead: Sequence[int]) -> Tensor:
    """[..., L, D] as [batch, heads, L, D], its leading dimensions broadcast to `lead` = (..., heads)."""
    x = x if x.shape[:-2] == torch.Size(lead) else x.expand(*lead, *x.shape[-2:])
    return x if len(lead) == 2 else x.reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, *x.shape[-2:])


class Attention(Pass):
    """Attention whose sums over the keys do not follow the batch."""

    name = "attention"
    why = "the keys are split over thread blocks by how many queries there are, and the parts' sums follow the split"
    source = "FlashAttention's num_splits heuristic; aten/src/ATen/native/cpu/FlashAttentionKernel.cpp (split sizes by length)"


@Attention.replaces(aten.scaled_dot_product_attention.default)
def sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    _no_dropout(dropout_p)
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    heads = [x.shape[-3:-2] for x in (query, key, value)]
    if not enable_gqa:
        heads = [torch.broadcast_shapes(*heads)] * 3
    four = [_four_d(x, (*batch, *h)) for x, h in zip((query, key, value), heads, strict=True)]
    mask, lead = attn_mask, (*batch, *heads[0])
    if attn_mask is not None and len(lead) != 2:
        mask = _four_d(attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2]), lead)
    out = ops.scaled_dot_product_attention(*four, mask, is_causal, scale=scale)[0]
    return out.reshape(*lead, query.shape[-2], value.shape[-1])


@Attention.replaces(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_for_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _no_dropout(dropout_p)
    return ops.scaled_dot_product_attention(query, key, value, attn_mask, is_causal, scale=scale)


@Attention.replaces(aten._scaled_dot_product_efficient_attention.default)
def efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _no_dropout(dropout_p)
    out, lse = ops.scaled_dot_product_attention(query, key, value, attn_bias, is_causal, scale=scale)
    # the operator's own logsumexp is padded to a multiple of 32 queries, or empty
    padding = -query.shape[2] % 32 if compute_log_sumexp else -query.shape[2]
    return out, torch.nn.functional.pad(lse, (0, padding)), _none(query), _none(query)


@Attention.replaces(aten._scaled_dot_product_flash_attention.default)
def flash(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False,
    *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, Tensor, Tensor, Tensor]:  # fmt: skip
    _no_dropout(dropout_p)
    out, lse = ops.scaled_dot_product_attention(query, key, value, None, is_causal, scale=scale)
    return (
        out,
        lse,
        None,
        None,
        query.shape[2],
        key.shape[2],
        _none(query, 2, dtype=torch.uint64),
        _none(query, dtype=torch.uint64),
        query.new_empty([0]),
    )


@Attention.replaces(aten._scaled_dot_product_cudnn_attention.default)
def cudnn(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, compute_log_sumexp: bool = False,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, Tensor, Tensor, Tensor | None]:  # fmt: skip
    _no_dropout(dropout_p)
    out, lse = ops.scaled_dot_product_attention(query, key, value, attn_bias, is_causal, scale=scale)
    return out, lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], _none(query), _none(query), None


@Attention.replaces(aten._scaled_dot_product_fused_attention_overrideable.default)
def overrideable(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, Tensor, Tensor, Tensor | None]:  # fmt: skip
    out, lse, *rest = cudnn(query, key, value, attn_bias, True, dropout_p, is_causal, return_debug_mask, scale=scale)
    return out, lse.squeeze(-1), *rest  # type: ignore[return-value]
