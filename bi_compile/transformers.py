"""transformers' models with the attention that vLLM computes with the pass, for a trainer.

    import bi_compile.transformers

    bi_compile.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(DIR, attn_implementation="bi_compile")

PyTorch's scaled_dot_product_attention knows no soft-cap, and counts a sequence's keys from the start of the padded or packed row,
so that the same sequence sums in another order there. This one computes each sequence as if it were alone: left- or right-padded
(a mask of zeros and ones, and position_ids that count from the first token), or packed (position_ids that begin at 0 again).
With windows, soft-caps and sinks. It has gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops

#: what a model writes as `attn_implementation`
NAME = "bi_compile"
#: arguments that would change the result, and are not covered
UNKNOWN = ("position_bias", "head_mask", "cache")


def register() -> None:
    """Have transformers know `attn_implementation="bi_compile"`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The model's mask [B, S] as it is: which keys a token sees follows from it and from the window."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def _refuse(what: str, remedy: str) -> None:
    raise NotImplementedError(f'attn_implementation="{NAME}" does not cover {what}: {remedy}')


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_ids: Tensor | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, Hq, L, D], key and value [B, Hkv, L, D]; attention_mask [B, L]; position_ids [B or 1, L]. Returns [B, L, Hq, D].

    Raises:
        NotImplementedError: what is not covered, and what to do instead.
    """
    if key.shape[2] != query.shape[2]:
        _refuse("a cache of keys", 'use_cache=False, or "sdpa" to generate')
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        _refuse("attention to later tokens", 'write "sdpa"')
    if dropout:
        _refuse(f"dropout={dropout}", "set the model's attention_dropout to 0, or call model.eval()")
    if attention_mask is not None and attention_mask.dim() != 2:
        _refuse(f"a mask of {attention_mask.dim()} dimensions", "give one of zeros and ones, [batch, length]")
    for name in UNKNOWN:
        if others.get(name) is not None:
            _refuse(f"{name}=", 'leave it out, or write "sdpa"')
    mask, places = (None if x is None else x[:, None, None] for x in (attention_mask, position_ids))
    left = None if sliding_window is None else sliding_window - 1
    if s_aux is None:
        out = _Attention.apply(query, key, value, mask, places, scaling, left, softcap)
    else:
        if torch.is_grad_enabled():
            _refuse("gradients with sinks", 'compute it under torch.no_grad(), or write "eager"')
        out, _ = ops.sequence_attention(
            query, key, value, mask, places, scale=scaling, left=left, softcap=softcap, sinks=s_aux
        )
    return out.transpose(1, 2), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, position_ids: Tensor | None, scale: float | None,
        left: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        ctx.given = {"scale": scale, "left": left, "softcap": softcap}
        out: Tensor
        out, lse = ops.sequence_attention(query, key, value, mask, position_ids, **ctx.given)
        ctx.save_for_backward(query, key, value, out, lse, mask, position_ids)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ops.sequence_attention_backward(grad, *ctx.saved_tensors, **ctx.given)
        return *found, None, None, None, None, None
