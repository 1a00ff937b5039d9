"""Products fused with a collective, and the collectives that add up."""

from typing import Any, NoReturn

import torch
import torch.distributed._functional_collectives
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, given, refuse

collectives = torch.ops._c10d_functional


def _order_free(input: Tensor, reduce_op: str, *args: Any, **kwargs: Any) -> bool:
    return reduce_op not in ops.REDUCE_OPS or not (input.is_floating_point() or input.is_complex())


def _coordinator(name: str) -> Any:
    """vLLM's group `name`."""
    from vllm.distributed import parallel_state

    group = parallel_state._groups[name]()
    if group is None:
        raise RuntimeError(f"vLLM's process group {name!r} is gone")
    return group


def _vllm_group(name: str) -> str:
    """torch.distributed's name for the device group of vLLM's group `name`."""
    return str(_coordinator(name).device_group.group_name)


def _two_gpus(tensor: Tensor, *rest: Any, group_name: str = "") -> bool:
    """One addition and one rounding, whichever kernel of vLLM or NCCL runs.

    FlashInfer's all-reduce (off by default) is left out: it marks what has not arrived by -0.0, and only up to some size.
    """
    if tensor.device.type != "cuda":
        return False
    group = _coordinator(group_name or rest[-1])
    others = ("fi_ar_comm", "qr_comm")
    return group.world_size == 2 and not any(getattr(group.device_communicator, name, None) for name in others)


def _shm_group(handle: int) -> str:
    """torch.distributed's name for the group of vLLM whose ranks share the memory `handle`.

    Raises:
        RuntimeError: no group of this process has it.
    """
    from vllm.distributed import parallel_state

    for found in parallel_state._groups.values():
        group = found()
        communicator = getattr(group, "device_communicator", None)
        if group is not None and getattr(getattr(communicator, "dist_module", None), "handle", None) == handle:
            return str(group.device_group.group_name)
    raise RuntimeError(f"no process group of vLLM's in this process has the shared memory {handle}")


def _hccl_group(hcom: str) -> str:
    """torch.distributed's name for the group whose HCCL communicator is called `hcom`.

    Raises:
        RuntimeError: no group of this process has it.
    """
    dist: Any = torch.distributed.distributed_c10d  # HCCL's backend has more than PyTorch's
    for group in dist._world.pg_map:
        backend = group._get_backend(torch.device("npu"))
        if backend.get_hccl_comm_name(dist.get_rank()) == hcom:
            return group.group_name
    raise RuntimeError(
        f"no process group of this process has the HCCL communicator {hcom!r}: make it with torch.distributed.new_group"
    )


class MatmulAllreduce(Pass):
    """Sums over ranks in rank order; fused products taken apart into a product and such a sum."""

    name = "matmul_allreduce"
    why = "a collective library chooses its algorithm, and with it the order of the sum over ranks, from the message's size"
    source = "NCCL and HCCL choose ring, tree or one-shot by size; gloo cuts rings into segments of the tensor"


@MatmulAllreduce.replaces(collectives.all_reduce.default, unless=_order_free)
def all_reduce(input: Tensor, reduce_op: str, group_name: str) -> Tensor:
    return ops.all_reduce(input, reduce_op, group_name)


@MatmulAllreduce.replaces(collectives.reduce_scatter_tensor.default, unless=_order_free)
def reduce_scatter(input: Tensor, reduce_op: str, group_size: int, group_name: str) -> Tensor:
    return ops.reduce_scatter(input, reduce_op, group_size, group_name)


@MatmulAllreduce.replaces("vllm.all_reduce.default", unless=_two_gpus)
def vllm_all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    return ops.all_reduce(tensor, "sum", _vllm_group(group_name))


@MatmulAllreduce.replaces(
    "_C.shm_allreduce.default",
    why="each rank adds the others' parts to its own, beginning with the next rank's, so that from three ranks on they hold different sums",
    source="vLLM csrc/cpu/shm.cpp (all_reduce_sum_impl, swizzled_ranks)",
)
def shm_allreduce(handle: int, data: Tensor) -> None:
    data.copy_(ops.all_reduce(data, "sum", _shm_group(handle)))


@MatmulAllreduce.replaces("vllm.reduce_scatter.default", unless=_two_gpus)
def vllm_reduce_scatter(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    moved = tensor.movedim(dim, 0).contiguous()
    return ops.reduce_scatter(moved, "sum", world_size, _vllm_group(group_name)).movedim(0, dim).contiguous()


@MatmulAllreduce.replaces(
    "symm_mem.fused_matmul_reduce_scatter.default",
    why="a product and a sum over ranks, both cut by the number of rows",
    source="torch/distributed/_symmetric_memory",
)
def fused_matmul_reduce_scatter(A: Tensor, B: Tensor, reduce_op: str, scatter_dim: int, group_name: str) -> Tensor:
    y = ops.mm(A.reshape(-1, A.shape[-1]), B).view(*A.shape[:-1], B.shape[1]).movedim(scatter_dim, 0).contiguous()
    size = ops.ranks(group_name)
    return ops.reduce_scatter(y, reduce_op, size, group_name).movedim(0, scatter_dim)


@MatmulAllreduce.replaces(
    "symm_mem.fused_all_gather_matmul.default",
    why="products cut by the number of rows",
    source="torch/distributed/_symmetric_memory",
)
def fused_all_gather_matmul(
    A: Tensor, Bs: list[Tensor], gather_dim: int, group_name: str, *, return_A: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    size = ops.ranks(group_name)
    gathered = collectives.all_gather_into_tensor(A.movedim(gather_dim, 0).contiguous(), size, group_name)
    whole = collectives.wait_tensor(gathered).movedim(0, gather_dim)
    products = [ops.mm(whole.reshape(-1, whole.shape[-1]), B).view(*whole.shape[:-1], B.shape[1]) for B in Bs]
    return (whole if return_A else None), products


@MatmulAllreduce.replaces(
    "npu.npu_mm_all_reduce_base.default",
    why="product and collective are cut into turns by the number of rows",
    source="vllm-ascend PR 6910 switches it off",
)
def npu_mm_all_reduce_base(
    x1: Tensor, x2: Tensor, hcom: str, *, reduce_op: str = "sum", bias: Tensor | None = None, x3: Tensor | None = None,
    comm_turn: int = 0, comm_mode: str | None = None, **quantised: Any,
) -> Tensor:  # fmt: skip
    # comm_turn and comm_mode say how the native kernel cuts its work, nothing about the result
    if named := given(quantised):
        refuse("npu_mm_all_reduce_base", named, "it has one for products without quantisation")
    x = x1.reshape(-1, x1.shape[-1])
    y = ops.mm(x, x2) if bias is None else ops.addmm(bias, x, x2)
    y = y.view(*x1.shape[:-1], x2.shape[1])
    return ops.all_reduce(y if x3 is None else y + x3, reduce_op, _hccl_group(hcom))


class InOneTree(Pass):
    """In the place of `MatmulAllreduce` with `tp_invariant`, where layers add up over ranks themselves: every other sum is refused."""

    name = MatmulAllreduce.name
    why, source = MatmulAllreduce.why, MatmulAllreduce.source


def _refused(*args: Any, **kwargs: Any) -> NoReturn:
    refuse(
        "a sum over ranks",
        ["tp_invariant"],
        "one rank alone would take it in another order; tp_invariant covers the layers RowParallelLinear, VocabParallelEmbedding and "
        "mixtures of experts: leave it out for this model",
    )


for _entry in MatmulAllreduce.entries:
    InOneTree.replaces(_entry.operator, why=_entry.why, source=_entry.source, unless=_entry.unless)(_refused)
