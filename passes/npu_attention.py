"""Ascend's attention operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.kernels.ascend import ascendc
from bi_compile.table import Pass, given, refuse
from bi_compile.targets.ascend import is_capturing

FUSION = "torch_npu takes scaled_dot_product_attention apart into it; what its kernel splits is not documented"
#: arguments that the replacement reads; every other one has to have its default
READ = ("atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "block_table", "num_heads", "scale", "input_layout",
        "num_key_value_heads", "sparse_mode", "block_size", "softmax_lse_flag", "inner_precise", "workspace")  # fmt: skip
DEFAULTS = {"pre_tokens": 2147483647, "next_tokens": 2147483647}
#: sparse_mode -> the arguments that name how far a query sees to both sides of its own position, which is that of the last
#: query at the last key (torch_npu's documentation); under a causal mask next_tokens has no effect
SEES: dict[int, dict[str, str]] = {0: {}, 3: {}, 4: {"left": "pre_tokens", "right": "next_tokens"}}


def _check(arguments: dict[str, Any]) -> None:
    """Refuses what `_attention` does not compute."""
    layout, sparse_mode = arguments.get("input_layout", "BSH"), arguments.get("sparse_mode", 0)
    free = {3: ("next_tokens",), 4: ("pre_tokens", "next_tokens")}.get(sparse_mode, ())
    plain = DEFAULTS | {name: arguments.get(name) for name in free}
    named = given({name: value for name, value in arguments.items() if name not in READ}, plain)
    if layout != "TND":
        named.append(f"input_layout={layout!r}")
    if sparse_mode not in SEES:
        named.append(f"sparse_mode={sparse_mode}")
    if sparse_mode == 0 and arguments.get("atten_mask") is not None:
        named.append("an atten_mask of its own")
    if named:
        refuse(
            "npu_fused_infer_attention_score",
            named,
            "it has one for the layout TND without quantisation, rotation, shared prefix or padding, and with sparse_mode 0 (no "
            "mask), 3 (causal) or 4 (a band)",
        )
    if is_capturing():
        refuse(
            "npu_fused_infer_attention_score",
            ["capture in an ACL graph"],
            'the lengths of the requests would stay in the graph; set compilation_config={"cudagraph_mode": "PIECEWISE"}',
        )


def _wrong(what: str) -> None:
    raise ValueError(f"npu_fused_infer_attention_score: {what}")


def _on_device(query: Tensor, ends: Sequence[int], keys: Sequence[int]) -> Tensor:
    """The lengths, [2, requests], in one copy that the host does not wait for."""
    npu = query.device.type == "npu"
    lengths = torch.tensor([ends, keys], dtype=torch.int32, pin_memory=npu)
    return lengths.to(query.device, non_blocking=npu)


def _in_pages(name: str, cache: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """[pages, block_size, kv_heads, head] of a cache [pages, block_size, H] or [pages, kv_heads, block_size, head]."""
    if cache.dim() == 3 and cache.shape[1] == block_size and cache.shape[2] % kv_heads == 0:
        return cache.unflatten(2, (kv_heads, -1))
    if cache.dim() != 4 or cache.shape[1:3] != (kv_heads, block_size):
        _wrong(
            f"{name} is {list(cache.shape)}, and a cache with block_size={block_size} and {kv_heads} key heads is [blocks, "
            "block_size, H] or [blocks, key heads, block_size, D]"
        )
    return cache.transpose(1, 2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, out: Sequence[Tensor] | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """All requests in one launch, and one copy of their lengths; AscendC's operator where its package is installed."""
    _check(arguments)
    ends, keys = list(arguments["actual_seq_lengths"]), list(arguments["actual_seq_lengths_kv"])
    table, block_size = arguments.get("block_table"), arguments.get("block_size", 0)
    if len(ends) != len(keys) or (table is not None and table.shape[0] < len(ends)):
        rows = "" if table is None else f", and block_table {table.shape[0]} rows"
        _wrong(f"actual_seq_lengths names {len(ends)} requests, actual_seq_lengths_kv {len(keys)}{rows}")
    if ends and (ends[-1] > query.shape[0] or min(ends) < 0 or min(keys) < 0):
        _wrong(f"lengths are negative, or more than the {query.shape[0]} tokens of query")
    if table is not None and max(keys, default=0) > table.shape[1] * block_size:
        _wrong(f"a request has {max(keys)} keys, and block_table names {table.shape[1]} pages of {block_size} for each")
    theirs = ascendc.attention()
    if theirs is not None and query.device.type == "npu":
        return ascendc.each_phase(theirs, query, key, value, out, **arguments)
    heads = arguments.get("num_heads", 1)
    kv_heads = arguments.get("num_key_value_heads", 0) or heads
    if table is not None:
        key, value = _in_pages("key", key, kv_heads, block_size), _in_pages("value", value, kv_heads, block_size)
        table = table[: len(ends)]
    mode = arguments.get("sparse_mode", 0)
    sees = {side: arguments.get(name, DEFAULTS[name]) for side, name in SEES[mode].items()} or {
        "right": 0 if mode else None
    }
    query, lengths = query.reshape(query.shape[0], heads, -1), _on_device(query, ends, keys)
    y, lse = ops.paged_attention(query, key, value, lengths, table, scale=arguments.get("scale", 1.0), **sees)
    if not arguments.get("softmax_lse_flag"):
        lse = lse.new_zeros(1) if out is None else out[1]
    else:
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(2)
    return (y, lse) if out is None else ascendc.into(out, y, lse)


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
    """Ascend's attention, that of a server and that of PyTorch's models."""

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
    return _attention(query, key, value, out=out, **arguments)


@NpuAttention.replaces("npu.npu_fusion_attention.default", source=FUSION)
def fusion_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    return *_fusion_attention(*args, **kwargs), 0, 0, 0


@NpuAttention.replaces("npu.npu_fusion_attention_v3.default", source=FUSION)
def fusion_attention_v3(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _fusion_attention(*args, **kwargs)
    seed = torch.zeros(1, dtype=torch.int64, device=found[0].device)
    return *found, seed, seed.clone()
