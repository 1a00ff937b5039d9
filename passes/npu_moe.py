"""Ascend's operators for mixtures of experts, and its quantised operators."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, given, refuse

GATE = "a row sum in a fused kernel"


def _int8(x1: Tensor, x2: Tensor, *args: Any, **kwargs: Any) -> bool:
    """int8 operands: their sums are exact in int32."""
    return x1.dtype == torch.int8 and x2.dtype == torch.int8 and kwargs.get("group_sizes") is None


def _int8_groups(x: Sequence[Tensor], weight: Sequence[Tensor], **kwargs: Any) -> bool:
    """Rows and weights of int8: their sums are exact in int32, and each is scaled and rounded by itself."""
    return all(t.dtype == torch.int8 for t in (*x, *weight))


def _per_token(input: Tensor, *args: Any, quant_mode: str = "pertoken", **kwargs: Any) -> bool:
    """quant_mode="pertoken": a row's scale is the row's maximum, the same in every order."""
    return quant_mode == "pertoken"


def _gate(
    x: Tensor, k: int, k_group: int, group_count: int, group_select_mode: int, renorm: int, norm_type: int, scale: float,
    eps: float, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores of all experts (norm_type 0: softmax, 1: sigmoid), and the k largest with their experts, times `scale`.

    `bias` is added to the scores for the choice alone. Of group_count groups of experts those k_group take part whose largest
    score (group_select_mode 0), or sum of the two largest (1), is greatest. The k scores are divided by their sum + eps with
    sigmoid, and with softmax where `renorm` says so.

    Source: csrc/moe/moe_gating_top_k of vllm-ascend 0.23 (moe_gating_top_k_without_group.h, SelectTopKExpertScore).
    """
    named = [
        f"{name}={value}"
        for name, value, known in (("norm_type", norm_type, (0, 1)), ("group_select_mode", group_select_mode, (0, 1)))
        if value not in known
    ]
    if (
        x.shape[-1] % group_count
        or k_group > group_count
        or (group_select_mode == 1 and x.shape[-1] == group_count > 1)
    ):
        named.append(f"{k_group} of {group_count} groups of {x.shape[-1]} experts")
    if named:
        refuse(
            "gating",
            named,
            "it has one for softmax and sigmoid, and groups of one size chosen by their one or two largest scores",
        )
    scores, y, experts = ops.moe_gate(
        x, k, k_group=k_group, groups=group_count, two_of_group=group_select_mode == 1, sigmoid=norm_type == 1,
        renorm=bool(renorm) or norm_type == 1, scale=scale, eps=eps, bias=bias,
    )  # fmt: skip
    return y, experts, scores


class NpuMoe(Pass):
    """Products of experts, gating and the sum over a token's experts; quantised operators where they are exact."""

    name = "npu_moe"
    source = "the operator's documented meaning (torch_npu 2.13)"


@NpuMoe.replaces(
    "npu.npu_grouped_matmul.default",
    unless=_int8_groups,
    why="the kernel's tiling follows the number of rows of each expert",
    source="the operator's documented meaning (torch_npu 2.13); vllm-ascend's batch-invariant mode leaves it",
)
def grouped_matmul(
    x: Sequence[Tensor], weight: Sequence[Tensor], *, bias: Sequence[Tensor] | None = None, group_list: Tensor | None = None,
    split_item: int | None = 0, group_type: int | None = None, group_list_type: int | None = 0, **others: Any,
) -> list[Tensor]:  # fmt: skip
    lists = {
        "several tensors in x": len(x) != 1,
        "several tensors in weight": len(weight) != 1,
        "no group_list": group_list is None,
    }
    modes = [
        f"{name}={value}"
        for name, value, known in (
            ("group_type", group_type, (0,)),
            ("split_item", split_item, (2, 3)),
            ("group_list_type", group_list_type, (0, 1)),
        )
        if value not in known
    ]
    if named := given(others | lists) + modes:
        refuse(
            "npu_grouped_matmul",
            named,
            "it has one for one tensor of rows, one of weights, split_item 2 or 3, group_type 0 and no quantisation",
        )
    assert group_list is not None
    added = None if bias is None else bias[0].to(x[0].dtype)
    return [ops.grouped_mm(x[0], weight[0], group_list, added, counts=group_list_type == 1)]


@NpuMoe.replaces("npu.npu_moe_gating_top_k_softmax.default", why=GATE)
def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    if finished is not None:
        refuse("npu_moe_gating_top_k_softmax", ["finished"], "leave it out")
    y, experts, _ = _gate(x, k, 1, 1, 0, 0, 0, 1.0, 0.0)
    rows = x.numel() // x.shape[-1]
    at = torch.arange(rows, device=x.device, dtype=torch.int32).reshape(*x.shape[:-1], 1)
    order = torch.arange(k, device=x.device, dtype=torch.int32) * rows + at
    return y, experts, order.to(torch.int32)


@NpuMoe.replaces("npu.npu_moe_gating_top_k.default", why=GATE)
def gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, input_ids: Tensor | None = None, tid2eid: Tensor | None = None,
    k_group: int = 1, group_count: int = 1, group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0,
    out_flag: bool = False, routed_scaling_factor: float = 1.0, eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if named := given({"renorm": renorm, "input_ids": input_ids, "tid2eid": tid2eid}):
        refuse("npu_moe_gating_top_k", named, "renormalise outside of it, and choose experts by their scores")
    return _gate(x, k, k_group, group_count, group_select_mode, 0, norm_type, routed_scaling_factor, eps, bias)


@NpuMoe.replaces(
    "_C_ascend.moe_gating_top_k.default",
    why=GATE,
    source="vllm_ascend/device/device_op.py; renorm=1 divides by the sum of the k, as its A5 adaptor writes out",
)
def ascend_gating_top_k(
    x: Tensor, k: int, k_group: int, group_count: int, group_select_mode: int, renorm: int, norm_type: int, out_flag: bool,
    routed_scaling_factor: float, eps: float, bias_opt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gate(x, k, k_group, group_count, group_select_mode, renorm, norm_type, routed_scaling_factor, eps, bias_opt)


@NpuMoe.replaces(
    "npu.npu_moe_token_unpermute.default",
    why="the sum over a token's experts, in an order of the kernel's",
)
def token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    if padded_mode:
        refuse("npu_moe_token_unpermute", ["padded_mode"], "leave it out")
    if probs is None:
        return permuted_tokens.index_select(0, sorted_indices.abs().long())
    return ops.moe_combine(permuted_tokens, sorted_indices, probs)


@NpuMoe.replaces(
    "npu.npu_quant_matmul.default",
    unless=_int8,
    why="float8 and float4 products round each partial sum",
)
def quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, **others: Any) -> NoReturn:
    refuse(
        "npu_quant_matmul",
        [f"operands of {x1.dtype} and {x2.dtype}"],
        "sums of int8 are exact; quantise the model to int8 (W8A8), or serve it in bfloat16",
    )


@NpuMoe.replaces(
    "npu.npu_grouped_matmul_swiglu_quant.default",
    "_C_ascend.grouped_matmul_swiglu_quant_weight_nz.default",
    unless=_int8,
    why="products of int4 are scaled in groups, each partial sum rounded",
)
def grouped_matmul_swiglu_quant(x: Tensor, weight: Tensor, *args: Any, **others: Any) -> NoReturn:
    refuse(
        "grouped_matmul_swiglu_quant",
        [f"operands of {x.dtype} and {weight.dtype}"],
        "sums of int8 are exact; quantise the model to int8 (W8A8), or serve it in bfloat16",
    )


@NpuMoe.replaces(
    "npu.npu_dynamic_quant.default",
    "npu.npu_dynamic_quant_asymmetric.default",
    unless=_per_token,
    why="a scale of the whole tensor is one of every request in the batch",
)
def dynamic_quant(input: Tensor, *, quant_mode: str, **others: Any) -> NoReturn:
    refuse(
        "npu_dynamic_quant",
        [f"quant_mode={quant_mode!r}"],
        'use quant_mode="pertoken": quantise the activations per token',
    )
