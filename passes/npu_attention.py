"""Ascend's attention operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.kernels.ascend import ascendc
from bi_compile.table import Pass, given, refuse
from bi_compile.targets import acl_graph
from bi_compile.targets.ascend import is_capturing

FIA, FIA_V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"

V2 = "the first version's meaning under other names (torch_npu 2.13's documentation); vllm-ascend calls it for latent attention"
FUSION = "torch_npu takes scaled_dot_product_attention apart into it; what its kernel splits is not documented"
#: arguments that the replacement reads; every other one has to have its default
READ = ("atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "block_table", "num_heads", "scale", "input_layout",
        "num_key_value_heads", "sparse_mode", "block_size", "softmax_lse_flag", "inner_precise", "workspace", "query_rope",
        "key_rope")  # fmt: skip
DEFAULTS = {"pre_tokens": 2147483647, "next_tokens": 2147483647}
#: names of npu_fused_infer_attention_score_v2 -> those of the first version; the meaning is the same
OF_V2 = {
    "actual_seq_qlen": "actual_seq_lengths", "actual_seq_kvlen": "actual_seq_lengths_kv", "num_query_heads": "num_heads",
    "softmax_scale": "scale", "return_softmax_lse": "softmax_lse_flag",
}  # fmt: skip
#: sparse_mode -> the arguments that name how far a query sees to both sides of its own position, which is that of the last
#: query at the last key (torch_npu's documentation); under a causal mask next_tokens has no effect
SEES: dict[int, dict[str, str]] = {0: {}, 3: {}, 4: {"left": "pre_tokens", "right": "next_tokens"}}
#: input_layout -> (from it to [T, N, D]; from [T, N, D] to it, with B requests of S tokens each). T is B * S, request by request;
#: what stands behind the underscore is the layout of the output
FROM_BNSD: Callable[[Tensor], Tensor] = lambda x: x.transpose(1, 2).flatten(0, 1)
FROM_BSND: Callable[[Tensor], Tensor] = lambda x: x.flatten(0, 1)
TO_NBSD: Callable[[Tensor, int, int], Tensor] = lambda y, b, s: y.unflatten(0, (b, s)).permute(2, 0, 1, 3)
QUERY_LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int, int], Tensor]]] = {
    "TND": (lambda x: x, lambda y, b, s: y),
    "TND_NTD": (lambda x: x, lambda y, b, s: y.transpose(0, 1)),
    "BNSD": (FROM_BNSD, lambda y, b, s: y.unflatten(0, (b, s)).transpose(1, 2)),
    "BNSD_NBSD": (FROM_BNSD, TO_NBSD),
    "BSND": (FROM_BSND, lambda y, b, s: y.unflatten(0, (b, s))),
    "BSND_NBSD": (FROM_BSND, TO_NBSD),
}


def _check(operator: str, arguments: dict[str, Any]) -> None:
    """Refuses what `_attention` does not compute."""
    layout, sparse_mode = arguments.get("input_layout", "BSH"), arguments.get("sparse_mode", 0)
    free = {3: ("next_tokens",), 4: ("pre_tokens", "next_tokens")}.get(sparse_mode, ())
    plain = DEFAULTS | {name: arguments.get(name) for name in free}
    named = given({name: value for name, value in arguments.items() if name not in READ}, plain)
    if layout not in QUERY_LAYOUTS or (not layout.startswith("TND") and arguments.get("block_table") is None):
        named.append(f"input_layout={layout!r}")
    elif layout != "TND" and arguments.get("softmax_lse_flag"):
        named.append(f"the logsumexp in the layout {layout}")
    if sparse_mode not in SEES:
        named.append(f"sparse_mode={sparse_mode}")
    if sparse_mode == 0 and arguments.get("atten_mask") is not None:
        named.append("an atten_mask of its own")
    if named:
        refuse(
            operator,
            named,
            "it has one for the layouts TND and TND_NTD, and with a block_table BNSD, BNSD_NBSD, BSND and BSND_NBSD, without quantisation, "
            "sinks, shared prefix or padding, and with sparse_mode 0 (no mask), 3 (causal) or 4 (a band)",
        )
    if is_capturing() and not acl_graph.is_captured():
        refuse(
            operator,
            ["capture in an ACL graph outside of a group of tasks"],
            "the lengths of the requests would stay in the graph; capture it between torch.npu.graph_task_group_begin and _end, as "
            'vllm-ascend does, or set compilation_config={"cudagraph_mode": "PIECEWISE"}',
        )


def _wrong(what: str) -> None:
    raise ValueError(f"npu_fused_infer_attention_score: {what}")


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


def _lengths(query: Tensor, arguments: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ends of the requests' tokens, and their keys; without actual_seq_lengths [B, .., S, ..] has B requests of S tokens."""
    layout, table, block_size = arguments["input_layout"], arguments.get("block_table"), arguments.get("block_size", 0)
    ends, keys = (arguments.get(name) for name in ("actual_seq_lengths", "actual_seq_lengths_kv"))
    if keys is None or (ends is None and layout.startswith("TND")):
        raise ValueError(
            "npu_fused_infer_attention_score takes the lengths of the requests' keys, and in the layout TND the ends of their tokens"
        )
    if layout.startswith("TND"):
        ends, keys, tokens = list(ends or ()), list(keys), query.shape[0]
    else:
        each = query.shape[2 if layout.startswith("BNSD") else 1]
        if ends is not None and any(n != each for n in ends):
            refuse(
                "npu_fused_infer_attention_score",
                ["padded queries"],
                "use the layout TND for requests of several lengths",
            )
        ends, keys, tokens = [each * (i + 1) for i in range(query.shape[0])], list(keys), query.shape[0] * each
    if len(ends) != len(keys) or (table is not None and table.shape[0] < len(ends)):
        rows = "" if table is None else f", and block_table {table.shape[0]} rows"
        _wrong(f"actual_seq_lengths names {len(ends)} requests, actual_seq_lengths_kv {len(keys)}{rows}")
    if ends and (ends[-1] > tokens or min(ends) < 0 or min(keys) < 0):
        _wrong(f"lengths are negative, or more than the {tokens} tokens of query")
    if table is not None and max(keys, default=0) > table.shape[1] * block_size:
        _wrong(f"a request has {max(keys)} keys, and block_table names {table.shape[1]} pages of {block_size} for each")
    return ends, keys


def _attention(
    operator: str, query: Tensor, key: Tensor, value: Tensor, out: Sequence[Tensor] | None, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """All requests in one launch, their lengths copied once for all layers of a step; AscendC's operator where its package is installed."""
    _check(operator, arguments)
    ends, keys = _lengths(query, arguments)
    table, block_size = arguments.get("block_table"), arguments.get("block_size", 0)
    theirs, rope = ascendc.attention(), arguments.get("query_rope")
    if theirs is not None and operator == FIA and rope is None and query.device.type == "npu":
        return ascendc.each_phase(theirs, query, key, value, out, **arguments)
    lengths = acl_graph.lengths(ends, keys, table is None, query.device)
    if acl_graph.is_update():
        assert out is not None
        return out[0], out[1]
    heads = arguments.get("num_heads", 1)
    kv_heads = arguments.get("num_key_value_heads", 0) or heads
    parts: dict[str, Any] = {"query_rope": rope, "key_rope": arguments.get("key_rope")}
    if table is not None:
        key, value = _in_pages("key", key, kv_heads, block_size), _in_pages("value", value, kv_heads, block_size)
        if parts["key_rope"] is not None:
            parts["key_rope"] = _in_pages("key_rope", parts["key_rope"], kv_heads, block_size)
        table = table[: len(ends)]
    mode = arguments.get("sparse_mode", 0)
    sees = {side: arguments.get(name, DEFAULTS[name]) for side, name in SEES[mode].items()} or {
        "right": 0 if mode else None
    }
    there, back = QUERY_LAYOUTS[arguments["input_layout"]]
    rows = there(query)
    parts["query_rope"] = None if rope is None else there(rope).reshape(rows.shape[0], heads, -1)
    q = rows.reshape(rows.shape[0], heads, -1)
    y, lse = ops.paged_attention(q, key, value, lengths, table, scale=arguments.get("scale", 1.0), **parts, **sees)
    y = back(y, query.shape[0], rows.shape[0] // max(query.shape[0], 1))
    if not arguments.get("softmax_lse_flag"):
        lse = acl_graph.zero(lse) if out is None else out[1]
    else:
        lse = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(2)
    return (y.contiguous(), lse) if out is None else ascendc.into(out, y, lse)


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
    return _attention(FIA, query, key, value, None, arguments)


@NpuAttention.replaces("npu.npu_fused_infer_attention_score.out")
def fused_infer_attention_score_out(
    query: Tensor, key: Tensor, value: Tensor, *, out: Sequence[Tensor], **arguments: Any
) -> tuple[Tensor, Tensor]:
    return _attention(FIA, query, key, value, out, arguments)


def _of_v2(arguments: dict[str, Any]) -> dict[str, Any]:
    return {OF_V2.get(name, name): value for name, value in arguments.items()}


@NpuAttention.replaces("npu.npu_fused_infer_attention_score_v2.default", source=V2)
def fused_infer_attention_score_v2(
    query: Tensor, key: Tensor, value: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    return _attention(FIA_V2, query, key, value, None, _of_v2(arguments))


@NpuAttention.replaces("npu.npu_fused_infer_attention_score_v2.out", source=V2)
def fused_infer_attention_score_v2_out(
    query: Tensor, key: Tensor, value: Tensor, *, out: Sequence[Tensor], **arguments: Any
) -> tuple[Tensor, Tensor]:
    return _attention(FIA_V2, query, key, value, out, _of_v2(arguments))


@NpuAttention.replaces("npu.npu_fusion_attention.default", source=FUSION)
def fusion_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    return *_fusion_attention(*args, **kwargs), 0, 0, 0


@NpuAttention.replaces("npu.npu_fusion_attention_v3.default", source=FUSION)
def fusion_attention_v3(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _fusion_attention(*args, **kwargs)
    seed = torch.zeros(1, dtype=torch.int64, device=found[0].device)
    return *found, seed, seed.clone()
