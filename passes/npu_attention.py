"""Ascend's attention operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, given, refuse
from bi_compile.targets.ascend import is_capturing

FUSION = "torch_npu takes scaled_dot_product_attention apart into it; what its kernel splits is not documented"
#: arguments that the replacement reads; every other one has to have its default
READ = ("atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "block_table", "num_heads", "scale", "input_layout",
        "num_key_value_heads", "sparse_mode", "block_size", "softmax_lse_flag", "inner_precise", "workspace")  # fmt: skip
DEFAULTS = {"pre_tokens": 2147483647, "next_tokens": 2147483647}


def _check(arguments: dict[str, Any]) -> None:
    """Refuses what `_attention` does not compute."""
    layout, sparse_mode = arguments.get("input_layout", "BSH"), arguments.get("sparse_mode", 0)
    # under a causal mask no query sees later keys, so next_tokens has no effect
    plain = DEFAULTS | ({"next_tokens": arguments.get("next_tokens")} if sparse_mode == 3 else {})
    named = given({name: value for name, value in arguments.items() if name not in READ}, plain)
    if layout != "TND":
        named.append(f"input_layout={layout!r}")
    if sparse_mode not in (0, 3):
        named.append(f"sparse_mode={sparse_mode}")
    if sparse_mode == 0 and arguments.get("atten_mask") is not None:
        named.append("an atten_mask of its own")
    if named:
        refuse(
            "npu_fused_infer_attention_score",
            named,
            "it has one for the layout TND without quantisation, rotation, shared prefix or padding, and with sparse_mode 0 (no "
            "mask) or 3 (causal)",
        )
    if is_capturing():
        refuse(
            "npu_fused_infer_attention_score",
            ["capture in an ACL graph"],
            'the lengths of the requests would stay in the graph; set compilation_config={"cudagraph_mode": "PIECEWISE"}',
        )


def _requests(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of each request, from their ends in the concatenated tokens."""
    return list(zip([0, *lengths[:-1]], lengths, strict=True))


def _attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Each request by itself: its shapes, and so its bits, are those that it has alone."""
    _check(arguments)
    heads = arguments.get("num_heads", 1)
    kv_heads = arguments.get("num_key_value_heads", 0) or heads
    table, ends_kv = arguments.get("block_table"), list(arguments["actual_seq_lengths_kv"])
    # with a block table actual_seq_lengths_kv holds the length of each request, without one the ends
    keys = [(0, n) for n in ends_kv] if table is not None else _requests(ends_kv)
    head = query.shape[-1]
    # key and value are then [blocks, block_size, kv_heads * head] or [blocks, block_size, kv_heads, head]
    width = value.shape[-1] if table is None else value.numel() // (value.shape[0] * arguments["block_size"] * kv_heads)
    out = query.new_zeros(query.shape[0], heads, width)
    lse = query.new_full((query.shape[0], heads, 1), float("inf"), dtype=torch.float32)
    for i, (start, end) in enumerate(_requests(list(arguments["actual_seq_lengths"]))):
        first, last = keys[i]
        length, count = end - start, last - first
        if length <= 0 or count <= 0:
            continue
        if table is None:
            k, v = key[first:last], value[first:last]
        else:
            blocks = table[i, : -(-count // arguments["block_size"])].long()
            k, v = (
                cache[blocks].reshape(
                    -1, kv_heads, cache.numel() // (cache.shape[0] * arguments["block_size"] * kv_heads)
                )[:count]
                for cache in (key, value)
            )
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[start:end].reshape(length, heads, head), k, v))
        mask = None
        if arguments.get("sparse_mode", 0) == 3:
            # the last query sees every key
            seen = torch.arange(count - length, count, device=query.device)
            mask = torch.arange(count, device=query.device)[None, :] <= seen[:, None]
        y, part = ops.scaled_dot_product_attention(q, k, v, mask, scale=arguments.get("scale", 1.0))
        out[start:end] = y[0].transpose(0, 1)
        lse[start:end, :, 0] = part[0].transpose(0, 1).float()
    return out, lse if arguments.get("softmax_lse_flag") else lse.new_zeros(1)


#: layout -> (from it to [B, N, S, D], and back); H is N * D
LAYOUTS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor], Tensor]]] = {
    "BNSD": (lambda x, width: x, lambda y: y),
    "BSND": (lambda x, width: x.transpose(1, 2), lambda y: y.transpose(1, 2)),
    "BSH": (lambda x, width: x.unflatten(2, (-1, width)).transpose(1, 2), lambda y: y.transpose(1, 2).flatten(2)),
    "SBH": (lambda x, width: x.unflatten(2, (-1, width)).permute(1, 2, 0, 3), lambda y: y.permute(2, 0, 1, 3).flatten(2)),
}  # fmt: skip


def _fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = 2147483647, next_tockens: int = 2147483647, inner_precise: int = 0, prefix: Any = None,
    actual_seq_qlen: Any = None, actual_seq_kvlen: Any = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None, dropout_mask: Tensor | None = None,
    seed: int = 0, offset: int = 0,  # of the dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention, and the statistics of its softmax: the largest score, and the sum of exp(score - largest).

    In their place stand log(sum(exp(score))) and 1, which give the same softmax.
    """
    others = {
        "pse": pse, "padding_mask": padding_mask, "keep_prob": keep_prob, "pre_tockens": pre_tockens, "next_tockens": next_tockens,
        "prefix": prefix, "actual_seq_qlen": actual_seq_qlen, "actual_seq_kvlen": actual_seq_kvlen, "softmax_layout": softmax_layout,
        "sink": sink, "dropout_mask": dropout_mask,
    }  # fmt: skip
    named = given(others, {"keep_prob": 1.0, "pre_tockens": 2147483647, "next_tockens": 2147483647})
    if input_layout not in LAYOUTS:
        named.append(f"input_layout={input_layout!r}")
    if sparse_mode not in (0, 1, 2, 3):
        named.append(f"sparse_mode={sparse_mode}")
    if named:
        refuse(
            "npu_fusion_attention",
            named,
            f"it has one for the layouts {', '.join(LAYOUTS)}, sparse_mode 0 to 3, and no dropout, window, bias, prefix or lengths",
        )
    there, back = LAYOUTS[input_layout]
    width = query.shape[-1] if query.dim() == 4 else query.shape[2] // head_num
    q, k = there(query, width), there(key, width)
    v = there(value, value.shape[2] * width // key.shape[2] if value.dim() == 3 else 0)
    mask = None
    if sparse_mode == 3:  # the last query sees every key
        seen = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=query.device)
        mask = torch.arange(k.shape[2], device=query.device)[None, :] <= seen[:, None]
    elif sparse_mode < 2 and atten_mask is not None:  # True hides a key
        mask = atten_mask.logical_not()
    y, lse = ops.scaled_dot_product_attention(q, k, v, mask, sparse_mode == 2, scale=scale)
    largest = lse.float().unsqueeze(-1).expand(-1, -1, -1, 8)
    return (
        back(y).contiguous(),
        largest.contiguous(),
        torch.ones_like(largest, memory_format=torch.contiguous_format),
        query.new_empty(0),
    )


class NpuAttention(Pass):
    """Ascend's attention: a server's is computed request by request, that of PyTorch's models in one call."""

    name = "npu_attention"
    why = "how the keys are split over cores follows the batch, and the parts' sums follow the split"
    source = "vllm-ascend PR 6910 replaces it; its users found that prefill and decode in one call change each other"


@NpuAttention.replaces("npu.npu_fused_infer_attention_score.default")
def fused_infer_attention_score(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return _attention(query, key, value, **arguments)


@NpuAttention.replaces("npu.npu_fused_infer_attention_score.out")
def fused_infer_attention_score_out(
    query: Tensor, key: Tensor, value: Tensor, *, out: Sequence[Tensor], **arguments: Any
) -> tuple[Tensor, Tensor]:
    attention, lse = _attention(query, key, value, **arguments)
    out[0].copy_(attention.reshape(out[0].shape))
    if arguments.get("softmax_lse_flag"):
        out[1].copy_(lse.reshape(out[1].shape))
    return out[0], out[1]


@NpuAttention.replaces("npu.npu_fusion_attention.default", source=FUSION)
def fusion_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    return *_fusion_attention(*args, **kwargs), 0, 0, 0


@NpuAttention.replaces("npu.npu_fusion_attention_v3.default", source=FUSION)
def fusion_attention_v3(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _fusion_attention(*args, **kwargs)
    seed = torch.zeros(1, dtype=torch.int64, device=found[0].device)
    return *found, seed, seed.clone()
