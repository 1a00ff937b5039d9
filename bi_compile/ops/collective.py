"""Reductions over the ranks of a process group, in rank order.

A collective library may split a tensor, and with it the order of the sum over ranks, by its size, which the batch
decides. Here each rank receives the parts of all ranks unreduced and adds them up itself: rank 0 + rank 1 + rank 2 + ...,
in float32 (float64 for float64, integers exactly), rounded once. Element by element, so neither the number of rows nor the place
of an element in the tensor can matter.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ._define import operator

REDUCE_OPS = ("sum", "avg")


def _check(name: str, reduce_op: str) -> None:
    torch._check(
        reduce_op in REDUCE_OPS,
        lambda: f"bi_compile::{name} takes the reduce_op {' or '.join(REDUCE_OPS)}, got {reduce_op!r}",
    )


@operator("all_reduce(Tensor x, str reduce_op, str group_name) -> Tensor")
def all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """Sum (or average, "avg") of x over the ranks of the group, the same on every rank. Moves world_size * x per rank."""
    _check("all_reduce", reduce_op)
    return x.new_empty(x.shape)


@operator("reduce_scatter(Tensor x, str reduce_op, int group_size, str group_name) -> Tensor")
def reduce_scatter(x: Tensor, reduce_op: str, group_size: int, group_name: str) -> Tensor:
    """Rank r's share of the sum: the r-th of group_size equal slices of dimension 0. Moves x once per rank (all-to-all)."""
    _check("reduce_scatter", reduce_op)
    torch._check(
        x.dim() > 0 and x.shape[0] % group_size == 0,
        lambda: f"bi_compile::reduce_scatter: dimension 0 of {tuple(x.shape)} does not split over {group_size} ranks",
    )
    return x.new_empty([x.shape[0] // group_size, *x.shape[1:]])


def _in_rank_order(parts: Tensor, reduce_op: str) -> Tensor:
    dtype = parts.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    if reduce_op == "avg":
        total = total / len(parts)
    return total.to(dtype).contiguous()


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    _check("all_reduce", reduce_op)
    group = _group(group_name)
    x = x.contiguous()
    parts = x.new_empty([group.size() * x.numel()])
    dist.all_gather_into_tensor(parts, x.view(-1), group=group)
    return _in_rank_order(parts.view(group.size(), *x.shape), reduce_op)


def _reduce_scatter(x: Tensor, reduce_op: str, group_size: int, group_name: str) -> Tensor:
    _check("reduce_scatter", reduce_op)
    group = _group(group_name)
    x = x.contiguous()
    parts = torch.empty_like(x)
    dist.all_to_all_single(parts, x, group=group)
    return _in_rank_order(parts.view(group_size, x.shape[0] // group_size, *x.shape[1:]), reduce_op)


#: written with other operators, so the same on every device: each kernel module registers them as they are
IMPLEMENTATIONS = {"all_reduce": _all_reduce, "reduce_scatter": _reduce_scatter}
