"""Ascend's attention operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, given, replaces
from bi_compile.targets.ascend import is_capturing

WHY = "how the keys are split over cores follows the batch, and the parts' sums follow the split"
SOURCE = "vllm-ascend PR 6910 replaces it; its users found that prefill and decode in one call change each other"
#: arguments that the replacement reads; every other one has to be as the operator's default has it
READ = ("atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "block_table", "num_heads", "scale", "input_layout",
        "num_key_value_heads", "sparse_mode", "block_size", "softmax_lse_flag", "inner_precise", "workspace")  # fmt: skip
DEFAULTS = {"pre_tokens": 2147483647, "next_tokens": 2147483647}


def _refuse(what: str) -> None:
    raise NotImplementedError(
        f"npu_fused_infer_attention_score with {what} has no invariant form here: it has one for the layout TND without "
        "quantisation, rotation, shared prefix or padding, and with sparse_mode 0 (no mask) or 3 (causal)"
    )


def _check(arguments: dict[str, Any]) -> None:
    # a causal mask has no keys behind a query, so how many of those may be seen says nothing
    plain = DEFAULTS | ({"next_tokens": arguments.get("next_tokens")} if arguments.get("sparse_mode") == 3 else {})
    named = given({name: value for name, value in arguments.items() if name not in READ}, plain)
    if named:
        _refuse(", ".join(named))
    if arguments.get("input_layout", "BSH") != "TND":
        _refuse(f"input_layout={arguments.get('input_layout', 'BSH')!r}")
    if arguments.get("sparse_mode", 0) not in (0, 3):
        _refuse(f"sparse_mode={arguments['sparse_mode']}")
    if arguments.get("sparse_mode", 0) == 0 and arguments.get("atten_mask") is not None:
        _refuse("an atten_mask of its own")
    if is_capturing():
        raise NotImplementedError(
            "attention cannot be captured in an ACL graph here, since the lengths of the requests would stay in it: set "
            'compilation_config={"cudagraph_mode": "PIECEWISE"}'
        )


def _requests(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each request from the ends."""
    return list(zip([0, *lengths[:-1]], lengths, strict=True))


def _attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Each request by itself: its shapes, and so its bits, are those that it has alone."""
    _check(arguments)
    heads = arguments.get("num_heads", 1)
    kv_heads = arguments.get("num_key_value_heads", 0) or heads
    table, ends_kv = arguments.get("block_table"), list(arguments["actual_seq_lengths_kv"])
    # with a block table the lengths of the keys are counted for each request, without one they add up
    keys = [(0, n) for n in ends_kv] if table is not None else _requests(ends_kv)
    head = query.shape[-1]
    # pages are [blocks, block_size, kv_heads * head], or have a dimension for each
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


class NpuAttention(Pass):
    """Ascend's attention, one call for each request."""

    name = "npu_attention"

    @replaces("npu.npu_fused_infer_attention_score.default", why=WHY, source=SOURCE)
    def fused_infer_attention_score(
        query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        return _attention(query, key, value, **arguments)

    @replaces("npu.npu_fused_infer_attention_score.out", why=WHY, source=SOURCE)
    def fused_infer_attention_score_out(
        query: Tensor, key: Tensor, value: Tensor, *, out: Sequence[Tensor], **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        attention, lse = _attention(query, key, value, **arguments)
        out[0].copy_(attention.reshape(out[0].shape))
        if arguments.get("softmax_lse_flag"):
            out[1].copy_(lse.reshape(out[1].shape))
        return out[0], out[1]
