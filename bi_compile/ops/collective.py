"""Reductions over the ranks of a process group, in rank order or in a tree.

A collective library may split a tensor, and with it the order of the sum over ranks, by its size, which the batch
decides. Here each rank receives the parts of all ranks unreduced and adds them up itself: rank 0 + rank 1 + rank 2 + ... (`all_reduce_tree`: pairs),
in float32 (float64 for float64, integers exactly), rounded once. Element by element, so neither the number of rows nor the place
of an element in the tensor can matter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers _c10d_functional
from torch import Tensor

from .batch import Pointwise, Resizes
from .declare import check, composite, operator
from .matmul import in_pairs

REDUCE_OPS = ("sum", "avg")


def ranks(group_name: str) -> int:
    """How many ranks the process group has."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # its parameter is a NewType of str
    return int(resolve(group_name).size())


def _check(name: str, reduce_op: str) -> None:
    check(
        reduce_op in REDUCE_OPS,
        lambda: f"bi_compile::{name} takes the reduce_op {' or '.join(REDUCE_OPS)}, got {reduce_op!r}",
    )


@operator("all_reduce(Tensor x, str reduce_op, str group_name) -> Tensor", batch=Pointwise())
def all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """Sum (or average, "avg") of x over the ranks of the group, the same on every rank. Moves world_size * x per rank."""
    _check("all_reduce", reduce_op)
    return x.new_empty(x.shape)


@operator("reduce_scatter(Tensor x, str reduce_op, int group_size, str group_name) -> Tensor", batch=Resizes())
def reduce_scatter(x: Tensor, reduce_op: str, group_size: int, group_name: str) -> Tensor:
    """Rank r's share of the sum: the r-th of group_size equal slices of dimension 0. Moves x once per rank (all-to-all)."""
    _check("reduce_scatter", reduce_op)
    check(
        x.dim() > 0 and x.shape[0] % group_size == 0,
        lambda: f"bi_compile::reduce_scatter: dimension 0 of {tuple(x.shape)} does not split over {group_size} ranks",
    )
    return x.new_empty([x.shape[0] // group_size, *x.shape[1:]])


@operator("all_reduce_tree(Tensor x, str group_name) -> Tensor", batch=Pointwise())
def all_reduce_tree(x: Tensor, group_name: str) -> Tensor:
    """Sum of x over the ranks of the group, a power of two of them, the same on every rank: a tree of adjacent pairs, in x's dtype.

    For four ranks (x0 + x1) + (x2 + x3): what `mm_segments` leaves on each rank becomes what it gives where one process has all of K.
    x: float32 or float64, since nothing may be rounded on the way. Moves world_size * x per rank.
    """
    check(
        x.dtype in (torch.float32, torch.float64),
        lambda: f"bi_compile::all_reduce_tree has no kernel for {x.dtype}: use float32 or float64",
    )
    return x.new_empty(x.shape)


def _in_rank_order(parts: Tensor, reduce_op: str) -> Tensor:
    dtype = parts.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    if reduce_op == "avg":
        total = total / len(parts)
    return total.to(dtype).contiguous()


def _of_all_ranks(x: Tensor, group_name: str) -> Tensor:
    """[ranks, *x.shape]"""
    size = ranks(group_name)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.reshape(1, -1), size, group_name)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(size, *x.shape)


@composite("all_reduce")
def _all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    _check("all_reduce", reduce_op)
    return _in_rank_order(_of_all_ranks(x, group_name), reduce_op)


@composite("all_reduce_tree")
def _all_reduce_tree(x: Tensor, group_name: str) -> Tensor:
    all_reduce_tree.meta(x, group_name)
    size = ranks(group_name)
    check(
        size & (size - 1) == 0,
        lambda: f"bi_compile::all_reduce_tree takes a power of two of ranks, the group has {size}",
    )
    return in_pairs(_of_all_ranks(x, group_name)).contiguous()


@composite("reduce_scatter")
def _reduce_scatter(x: Tensor, reduce_op: str, group_size: int, group_name: str) -> Tensor:
    _check("reduce_scatter", reduce_op)
    share = x.shape[0] // group_size
    splits = [share] * group_size
    exchanged = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), splits, splits, group_name)
    return _in_rank_order(
        torch.ops._c10d_functional.wait_tensor(exchanged).view(group_size, share, *x.shape[1:]), reduce_op
    )
