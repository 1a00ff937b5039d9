"""Scaled dot product attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Attention
from .declare import check, operator
from .reduce import _float


@operator(
    "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, "
    "*, float? scale=None) -> (Tensor, Tensor)",
    batch=Attention("query", "key", "value"),
)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(query @ key^T * scale + mask) @ value for each batch and head.

    query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], Hq a multiple of Hkv (grouped heads). attn_mask: bool
    (True takes part) or float (added), broadcastable to [B, Hq, L, S]. is_causal: position i of L sees the keys 0..i, as
    in `torch.nn.functional.scaled_dot_product_attention`. scale: 1/sqrt(D) unless given. No dropout.

    Returns the output [B, Hq, L, Dv], contiguous, in query's dtype, and the logsumexp of the scaled, masked scores
    [B, Hq, L] in float32 (float64 for float64). A row without any key gives 0 (and a logsumexp of -inf).

    A query row's result depends on that row, its keys, values and mask alone: scores as in `mm` (sum over D), softmax's
    sum and the sum over S ascending in S, so that masked keys behind the last seen one do not change the bits.
    """
    _float("scaled_dot_product_attention", query)
    check(
        query.dim() == key.dim() == value.dim() == 4 and query.dtype == key.dtype == value.dtype,
        lambda: (
            "bi_compile::scaled_dot_product_attention takes 4-D query, key and value of one dtype, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (query, key, value))
        ),
    )
    check(
        query.shape[1] % key.shape[1] == 0,
        lambda: (
            f"bi_compile::scaled_dot_product_attention: {query.shape[1]} query heads are no multiple of {key.shape[1]} key heads"
        ),
    )
    stat = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty([*query.shape[:-1], value.shape[-1]]), query.new_empty(query.shape[:-1], dtype=stat)
