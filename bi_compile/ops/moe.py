"""Mixtures of experts: the gate, and the sum over a token's experts; the products between are `grouped_mm`. Or all after the gate."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Combines, Experts, Normalises
from .declare import check, composite, operator
from .matmul import mm
from .pointwise import pointwise
from .reduce import softmax
from .reduce import sum as row_sum

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _check_dtype(name: str, *tensors: Tensor) -> None:
    for dtype in [t.dtype for t in tensors if t.dtype not in NARROW]:
        raise RuntimeError(f"bi_compile::{name} has no kernel for {dtype}: use float32, bfloat16 or float16")


@operator(
    "moe_gate(Tensor x, int k, *, int k_group=1, int groups=1, bool two_of_group=False, bool sigmoid=False, bool renorm=False, "
    "float scale=1.0, float eps=0.0, Tensor? bias=None) -> (Tensor, Tensor, Tensor)",
    batch=Normalises(-1),
)
def moe_gate(
    x: Tensor,
    k: int,
    *,
    k_group: int = 1,
    groups: int = 1,
    two_of_group: bool = False,
    sigmoid: bool = False,
    renorm: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's k experts and their weights, from x [..., E] in float32, bfloat16 or float16.

    Returns the scores of all experts [..., E], float32 (softmax of the row in `softmax`'s order, or sigmoid); the weights of the
    chosen [..., k] in x's dtype; the chosen [..., k], int32. All contiguous.

    Chosen are the k largest of score + bias (bias [E], float32 or narrower; it counts for the choice alone), the largest first,
    equal ones lowest index first. NaN is the largest, and -0.0 equals 0.0. With k_group < groups, only experts of the k_group best of
    `groups` equal groups are chosen while there are any: a group counts by its largest score + bias, or (two_of_group) by the sum
    of its two largest, equal groups lowest index first.

    A weight is the score * scale; with renorm score / (total + eps) * scale, where the total adds the k scores one after the
    other, in the order in which they were chosen. In float32, rounded to x's dtype once.
    """
    _check_dtype("moe_gate", x, *([] if bias is None else [bias]))
    experts = x.shape[-1] if x.dim() else 0
    check(
        x.dim() > 0 and 0 < k <= experts and 0 < k_group <= groups and experts % groups == 0,
        lambda: (
            f"bi_compile::moe_gate cannot take {k} of {experts} experts in {k_group} of {groups} groups of one size"
        ),
    )
    check(
        not two_of_group or experts // groups > 1,
        lambda: f"bi_compile::moe_gate: {groups} groups of {experts} experts have no two largest",
    )
    check(
        bias is None or bias.shape == (experts,),
        lambda: (
            f"bi_compile::moe_gate takes a bias of {experts} experts, got {tuple(bias.shape) if bias is not None else None}"
        ),
    )
    shape = list(x.shape[:-1])
    return (
        x.new_empty([*shape, experts], dtype=torch.float32),
        x.new_empty([*shape, k]),
        x.new_empty([*shape, k], dtype=torch.int32),
    )


@composite("moe_gate")
def _moe_gate(
    x: Tensor,
    k: int,
    *,
    k_group: int = 1,
    groups: int = 1,
    two_of_group: bool = False,
    sigmoid: bool = False,
    renorm: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    moe_gate.meta(
        x, k, k_group=k_group, groups=groups, two_of_group=two_of_group, sigmoid=sigmoid, renorm=renorm, scale=scale, eps=eps, bias=bias
    )  # fmt: skip
    scores = pointwise("aten.sigmoid.default", [x.float()]) if sigmoid else softmax(x, -1, dtype=torch.float32)
    experts = choose_experts(scores if bias is None else scores + bias.float(), k, k_group, groups, two_of_group)
    weights = scores.gather(-1, experts)
    if renorm:
        total = weights[..., :1]
        for i in range(1, k):
            total = total + weights[..., i : i + 1]
        weights = weights / (total + eps)
    return scores, (weights * scale).to(x.dtype).contiguous(), experts.to(torch.int32).contiguous()


def choose_experts(by: Tensor, k: int, k_group: int, groups: int, two_of_group: bool) -> Tensor:
    """`moe_gate`'s choice: int64 [..., k], from what it chooses by [..., E]. A stable sort takes the first of equal ones."""
    if k_group < groups:
        each = by.unflatten(-1, (groups, -1))
        best = torch.sort(each, dim=-1, descending=True, stable=True)[0]
        of_group = best[..., 0] + best[..., 1] if two_of_group else best[..., 0]
        order = torch.sort(of_group, dim=-1, descending=True, stable=True)[1]
        rank = torch.sort(order, dim=-1, stable=True)[1]  # of each group
        by = each.masked_fill((rank >= k_group).unsqueeze(-1), -torch.inf).flatten(-2)
    return torch.sort(by, dim=-1, descending=True, stable=True)[1][..., :k]


@operator("moe_combine(Tensor x, Tensor rows, Tensor weights) -> Tensor", batch=Combines("x", "weights"))
def moe_combine(x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The sum over each token's experts: x [M, H], rows [N * k], int32 or int64, and weights [N, k] give [N, H], contiguous.

    Token n gets the sum over i of weights[n, i] * x[|rows[n * k + i]|], i ascending, in a float32 accumulator, rounded once to x's
    dtype. On a CPU each product is rounded first; the Triton kernel fuses it into the sum, which is the same where both have 16
    bits. The rows are moved, never summed in another order: where they lie changes nothing. float32, bfloat16, float16. k == 0 gives 0.

    Rows are read on the device and not checked there (on a CPU: an IndexError).
    """
    _check_dtype("moe_combine", x, weights)
    check(
        x.dim() == 2
        and weights.dim() == 2
        and rows.dim() == 1
        and rows.shape[0] == weights.shape[0] * weights.shape[1],
        lambda: (
            "bi_compile::moe_combine takes x [M, H], weights [N, k] and a row for each of them, got "
            f"{tuple(x.shape)}, {tuple(weights.shape)} and {tuple(rows.shape)}"
        ),
    )
    check(
        rows.dtype in (torch.int32, torch.int64),
        lambda: f"bi_compile::moe_combine takes rows of int32 or int64, got {rows.dtype}",
    )
    return x.new_empty(weights.shape[0], x.shape[1])


@composite("moe_combine")
def _moe_combine(x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    out = moe_combine.meta(x, rows, weights)
    parts = x.index_select(0, rows.abs()).unflatten(0, weights.shape).float() * weights.float().unsqueeze(-1)
    total = torch.zeros_like(out, dtype=torch.float32)
    for i in range(weights.shape[1]):
        total = total + parts[:, i]
    return total.to(x.dtype)


@operator(
    "moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor? weights, str act, Tensor? gate_up_bias=None, "
    "Tensor? down_bias=None) -> Tensor",
    batch=Experts("x", ("experts", "weights")),
)
def moe_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    weights: Tensor | None,
    act: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Each token's experts and their sum: x [N, H], gate_up [E, 2 * I, H], down [E, H, I], experts and weights [N, k] give [N, H].

    An expert computes act(gate, up) of the two halves of x @ gate_up^T, times down^T: act is "silu" or "gelu" or "gelu_tanh" of
    gate, times up; or "swigluoai", where gate and up take turns: gate to 7 at most and up within 7, gate * sigmoid(1.702 * gate) *
    (up + 1). Biases [E, 2 * I] and [E, H] are added to a product that is rounded.

    It rounds where transformers' experts do (grouped_mm_experts_forward): every product, activation and weighted row to x's
    dtype; the sum over k has the order of `bi_compile::sum` and is rounded once. weights: any float dtype; None: all are 1.
    """
    _check_dtype("moe_experts", x)
    check(
        x.dim() == experts.dim() == 2
        and gate_up.dim() == down.dim() == 3
        and x.shape[0] == experts.shape[0]
        and gate_up.shape == (down.shape[0], 2 * down.shape[2], x.shape[1])
        and down.shape[1] == x.shape[1]
        and x.dtype == gate_up.dtype == down.dtype
        and (weights is None or weights.shape == experts.shape),
        lambda: (
            "bi_compile::moe_experts takes x [N, H], gate_up [E, 2 * I, H] and down [E, H, I] of one dtype and a weight for each of experts "
            f"[N, k], got {', '.join(f'{tuple(t.shape)} {t.dtype}' for t in (x, gate_up, down, experts))} and "
            f"{None if weights is None else tuple(weights.shape)}"
        ),
    )
    check(
        act in ("silu", "gelu", "gelu_tanh", "swigluoai"),
        lambda: f"bi_compile::moe_experts knows silu, gelu, gelu_tanh and swigluoai, not {act!r}",
    )
    return x.new_empty(x.shape)


def _gated(y: Tensor, act: str) -> Tensor:
    if act == "swigluoai":
        gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * pointwise("aten.sigmoid.default", [gate * 1.702]))
    gate, up = y.chunk(2, -1)
    if act == "silu":
        return pointwise("aten.silu.default", [gate]) * up
    return pointwise("aten.gelu.default", [gate], word="tanh" if act == "gelu_tanh" else "none") * up


@composite("moe_experts")
def _moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor | None, act: str, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    moe_experts.meta(x, gate_up, down, experts, weights, act, gate_up_bias, down_bias)
    parts = x.new_zeros(*experts.shape, x.shape[1])
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        y = mm(x[token], gate_up[expert].t())
        y = _gated(y if gate_up_bias is None else y + gate_up_bias[expert].to(y.dtype), act)
        y = mm(y, down[expert].t())
        y = y if down_bias is None else y + down_bias[expert].to(y.dtype)
        if weights is not None:
            y = (y.float() * weights[token, choice].unsqueeze(1).float()).to(y.dtype)
        parts[token, choice] = y
    return row_sum(parts, [1])
