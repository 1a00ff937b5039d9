"""Products. The order of every sum depends on K, the dtype and the device alone; see `bi_compile.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import GroupedProduct, Product, TransposedProduct
from .declare import check, composite, operator

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check(name: str, dims: int, *operands: Tensor) -> None:
    a, b = operands[0], operands[1]
    check(
        a.dim() == dims and b.dim() == dims,
        lambda: f"bi_compile::{name} takes {dims}-D operands, got {a.dim()}-D and {b.dim()}-D",
    )
    check(
        all(x.dtype == a.dtype for x in operands),
        lambda: (
            f"bi_compile::{name} takes operands of one dtype, got {', '.join(str(x.dtype) for x in operands)}: cast them first"
        ),
    )
    check(
        a.dtype in FLOATS,
        lambda: f"bi_compile::{name} has no kernel for {a.dtype}: use float32, bfloat16, float16 or float64",
    )
    check(
        a.shape[-1] == b.shape[-2], lambda: f"bi_compile::{name} cannot multiply {tuple(a.shape)} by {tuple(b.shape)}"
    )


@operator("mm(Tensor a, Tensor b) -> Tensor", batch=Product("a", "b"))
def mm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`: [M, K] by [K, N] gives [M, N], contiguous, in the operands' dtype.

    Row m of the result depends on row m of `a` and on `b`, not on M or m. K is summed in an order that K, the dtype and
    the device decide; products of bfloat16 and float16 are accumulated in float32 and rounded once.
    """
    _check("mm", 2, a, b)
    return a.new_empty(a.shape[0], b.shape[1])


@operator("mm_segments(Tensor a, Tensor b, int segments) -> Tensor", batch=Product("a", "b"))
def mm_segments(a: Tensor, b: Tensor, segments: int) -> Tensor:
    """`a @ b`, K taken in equal segments: [M, K] by [K, N] gives [M, N], contiguous, in float32 (of float64: in float64), not rounded.

    Each segment is summed as `mm` sums a K of its length. The segments' sums s are joined in a tree of adjacent pairs: for four of them
    (s0 + s1) + (s2 + s3). So a process that holds an aligned part of K has a subtree, and `all_reduce_tree` finishes the tree: the
    bits are the same whether 1, 2, 4, ... processes divide K. `segments`: a power of two that divides K.
    """
    _check("mm_segments", 2, a, b)
    check(
        segments > 0 and segments & (segments - 1) == 0 and a.shape[1] % segments == 0,
        lambda: (
            f"bi_compile::mm_segments: K = {a.shape[1]} does not divide into {segments} segments, or that is no power of two"
        ),
    )
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


def in_pairs(parts: Tensor) -> Tensor:
    """The sum over dimension 0, whose size is a power of two, as a tree of adjacent pairs, in the tensor's dtype."""
    while parts.shape[0] > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


@operator("addmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1) -> Tensor", batch=Product("a", "b"))
def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * bias + alpha * (a @ b)`: the sums of `mm`; scaled and the bias added in the accumulator, rounded once.

    `bias` is broadcastable to [M, N]. With beta == 0 the bias is not read, as in `torch.addmm`.
    """
    _check("addmm", 2, a, b, bias)
    return a.new_empty(a.shape[0], b.shape[1])


@operator("bmm(Tensor a, Tensor b) -> Tensor", batch=Product("a", "b"))
def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for each batch: [B, M, K] by [B, K, N] gives [B, M, N], contiguous. Each is the `mm` of its pair, bit for bit."""
    _check("bmm", 3, a, b)
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@operator("bmm_transposed(Tensor a, Tensor b) -> Tensor", batch=TransposedProduct("a", "b"))
def bmm_transposed(a: Tensor, b: Tensor) -> Tensor:
    """`bmm(a, b).transpose(0, 1)`, contiguous: [B, M, K] by [B, K, N] gives [M, B, N]. The sums are those of `bmm`, bit for bit."""
    _check("bmm_transposed", 3, a, b)
    return a.new_empty(a.shape[1], a.shape[0], b.shape[2])


@composite("bmm_transposed")
def _bmm_transposed(a: Tensor, b: Tensor) -> Tensor:
    bmm_transposed.meta(a, b)
    return bmm(a, b).transpose(0, 1).contiguous()


@operator(
    "baddbmm(Tensor bias, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1) -> Tensor", batch=Product("a", "b")
)
def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * bias + alpha * (a @ b)` for each batch: `addmm` of each triple, bit for bit. `bias` broadcasts to [B, M, N]."""
    _check("baddbmm", 3, a, b, bias)
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@operator(
    "grouped_mm(Tensor a, Tensor b, Tensor offs, Tensor? bias=None, *, bool counts=False) -> Tensor",
    batch=GroupedProduct("a", "b"),
)
def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, *, counts: bool = False) -> Tensor:
    """The products of a mixture of experts: [M, K], its rows sorted by group, and [G, K, N] give [M, N], contiguous.

    `offs`: int32 or int64 [G], where each group's rows end, ascending; or (counts) how many rows each group has. `bias`: [G, N],
    added in the accumulator. Row m is the `mm` (with a bias `addmm`) of row m of `a` with its group's matrix, bit for bit, wherever
    the groups begin; rows behind the last end are zeros. float32, bfloat16, float16.
    """
    check(
        a.dim() == 2 and b.dim() == 3,
        lambda: f"bi_compile::grouped_mm takes operands of 2 and 3 dimensions, got {a.dim()} and {b.dim()}",
    )
    _check("grouped_mm", 3, a.unsqueeze(0), b)
    check(a.dtype != torch.float64, lambda: "bi_compile::grouped_mm has no kernel for torch.float64: use float32")
    check(
        offs.dim() == 1 and offs.shape[0] == b.shape[0] and offs.dtype in (torch.int32, torch.int64),
        lambda: (
            f"bi_compile::grouped_mm takes an end for each of its {b.shape[0]} groups, int32 or int64, got {offs.dtype} {tuple(offs.shape)}"
        ),
    )
    check(
        bias is None or (bias.dtype == a.dtype and bias.shape == (b.shape[0], b.shape[2])),
        lambda: f"bi_compile::grouped_mm takes a bias of {a.dtype} {(b.shape[0], b.shape[2])}",
    )
    return a.new_empty(a.shape[0], b.shape[2])
