"""Normalisations over the last dimension, of length C, and group_norm. Statistics in float32 or wider, one rounding each."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Normalises, PerToken
from .declare import check, composite, operator
from .reduce import _float


def _statistic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _affine(name: str, x: Tensor, *params: Tensor | None) -> None:
    _float(name, x)
    for p in params:
        check(
            p is None or (p.dim() == 1 and p.shape[0] == x.shape[-1]),
            lambda: (
                f"bi_compile::{name} takes a weight or bias of {x.shape[-1]} elements, got {None if p is None else tuple(p.shape)}"
            ),
        )


@operator("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)", batch=Normalises(-1))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y = x * rstd * weight with rstd = 1 / sqrt(mean(x * x) + eps), computed in float32 or wider.

    x [..., C]; weight [C] of any float dtype, or None. Returns y (x's shape and dtype, contiguous) and rstd [..., 1] in
    float32 (float64 for float64). The sum over C has the order of `bi_compile::sum`.

    It rounds where transformers' models and vLLM's definition do: squares, mean and mean + eps to float32, x * rstd to weight's
    dtype, y to x's dtype. On a CPU it has the bits of theirs. On an NPU y alone is rounded, as by npu_rms_norm.
    """
    _affine("rms_norm", x, weight)
    return x.new_empty(x.shape), x.new_empty([*x.shape[:-1], 1], dtype=_statistic(x))


@operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    batch=Normalises(-1),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + residual, rounded to x's dtype; then `rms_norm(s, weight, eps)`, bit for bit.

    x and residual have one shape and dtype. Returns y, rstd [..., 1] and s, in the order of `npu_add_rms_norm`.
    """
    check(
        x.dtype == residual.dtype and x.shape == residual.shape,
        lambda: (
            f"bi_compile::add_rms_norm takes x and residual of one shape and dtype, got {tuple(x.shape)} {x.dtype} and {tuple(residual.shape)} {residual.dtype}"
        ),
    )
    _affine("add_rms_norm", x, weight)
    return x.new_empty(x.shape), x.new_empty([*x.shape[:-1], 1], dtype=_statistic(x)), x.new_empty(x.shape)


@operator(
    "qk_norm(Tensor qkv, Tensor q_weight, Tensor k_weight, int q_heads, int k_heads, float eps) -> (Tensor, Tensor)",
    batch=PerToken(("qkv",)),
)
def qk_norm(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, q_heads: int, k_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of each head of queries and of keys, bit for bit, in one kernel.

    qkv [T, C], rows contiguous: in a row q_heads heads of D elements, then k_heads, then anything. q_weight and k_weight [D], of one float
    dtype. Returns q [T, q_heads, D] and k [T, k_heads, D], contiguous, in qkv's dtype.
    """
    name, size = "bi_compile::qk_norm", q_weight.shape[0]
    _float(name, qkv)
    check(
        qkv.dim() == 2
        and q_weight.dim() == k_weight.dim() == 1
        and q_weight.shape == k_weight.shape
        and q_weight.dtype == k_weight.dtype
        and q_heads > 0
        and k_heads > 0
        and qkv.shape[1] >= (q_heads + k_heads) * size,
        lambda: (
            f"{name} takes qkv [T, C] with {q_heads} and {k_heads} heads in a row, and two weights of a head's length and one dtype, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (qkv, q_weight, k_weight))
        ),
    )
    return qkv.new_empty(qkv.shape[0], q_heads, size), qkv.new_empty(qkv.shape[0], k_heads, size)


@composite("qk_norm")
def _qk_norm(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, q_heads: int, k_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    qk_norm.meta(qkv, q_weight, k_weight, q_heads, k_heads, eps)
    size = q_weight.shape[0]
    q, k = qkv[:, : (q_heads + k_heads) * size].unflatten(1, (-1, size)).split([q_heads, k_heads], 1)
    return rms_norm(q, q_weight, eps)[0], rms_norm(k, k_weight, eps)[0]


@operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)", batch=Normalises(-1)
)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps), var biased and in two passes, y rounded once.

    x [..., C]; weight and bias [C] or None. Returns y (contiguous), mean and rstd [..., 1] in float32 (float64 for float64).
    """
    _affine("layer_norm", x, weight, bias)
    stat = [*x.shape[:-1], 1]
    return x.new_empty(x.shape), x.new_empty(stat, dtype=_statistic(x)), x.new_empty(stat, dtype=_statistic(x))


@operator(
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor, Tensor)",
    batch=Normalises(1),
)
def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm`'s statistics over each of `groups` groups of channels, then weight and bias for each channel.

    x [N, channels, ...]; weight and bias [channels] or None. The C = channels / groups * (rest) elements of a group are
    read in row-major order. Returns y (contiguous), mean and rstd [N, groups] in float32 (float64 for float64).
    """
    _float("group_norm", x)
    check(
        x.dim() >= 2 and groups > 0 and x.shape[1] % groups == 0,
        lambda: f"bi_compile::group_norm needs channels divisible by groups, got {tuple(x.shape)} and {groups}",
    )
    stat = [x.shape[0], groups]
    return x.new_empty(x.shape), x.new_empty(stat, dtype=_statistic(x)), x.new_empty(stat, dtype=_statistic(x))
