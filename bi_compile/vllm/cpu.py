"""vLLM on a CPU: linear layers stay products that the passes can see, and attention does not split the keys.

Mixtures of experts: vLLM's router is made of operators that are in the table, softmax routing in transformers' order of them; the
kernel for the experts is replaced by the pass cpu_moe. Each rank holds a part of every expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from ..errors import HostError
from .experts import check_data_parallel, check_routing
from .platforms import Platform, Switch
from .shared import attribute


def _plain_linear() -> Switch:
    """Keep linear layers as torch.nn.functional.linear with their weight: vLLM packs it for oneDNN, which varies by M."""
    from vllm.model_executor.layers import utils

    packed: Callable[..., None] = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim != 2:
            packed(layer, remove_weight)
        else:
            layer.cpu_linear = torch.nn.functional.linear

    return attribute(utils, "dispatch_cpu_unquantized_gemm", dispatch_cpu_unquantized_gemm)


def _softmax_routing() -> Switch:
    """Round the weights of a token's experts where transformers' models do: vLLM's router for CPUs takes softmax of the chosen alone."""
    try:
        from vllm.model_executor.layers.fused_moe.router import cpu_router
    except ImportError:  # before vLLM 0.32: as invariant, with the roundings of that release
        return contextlib.nullcontext()

    def _softmax_topk(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.softmax(router_logits, -1, dtype=torch.float32)
        weights, experts = torch.topk(scores, top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(router_logits.dtype).float(), experts.int()

    return attribute(cpu_router, "_softmax_topk", _softmax_topk)


def _sum_over_ranks() -> Switch:
    """Where vLLM's ranks have no shared memory of their own, uncompiled code adds up over them by `ops.all_reduce`, as graphs do."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    plain: Callable[..., torch.Tensor] = CpuCommunicator.all_reduce

    def all_reduce(self: Any, input_: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or self.dist_module is not torch.distributed:
            return plain(self, input_)  # an operator that is replaced
        return input_.copy_(ops.all_reduce(input_, "sum", self.device_group.group_name))

    return attribute(CpuCommunicator, "all_reduce", all_reduce)


def _permit_amx(vllm_config: Any) -> None:
    """Ask the system for AMX, which vLLM's attention uses where the processor has it.

    vLLM relies on oneDNN's packed products to have asked; they are off (`_plain_linear`), and without the permission the first
    tile instruction ends the process (SIGILL).
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise HostError(
            "the processor has AMX, which vLLM's CPU attention uses, but the system does not permit it (arch_prctl ARCH_REQ_XCOMP_PERM): "
            "permit it, or hide AMX from the virtual machine"
        )


def before_config(vllm_config: Any) -> None:
    if vllm_config.parallel_config.enable_expert_parallel:
        raise HostError(
            "enable_expert_parallel=True: experts that are divided among ranks were not tried on a CPU, where vLLM's kernel takes every rank "
            "to have all of them; remove that line: tensor_parallel_size divides each expert"
        )
    check_data_parallel(vllm_config)


PLATFORM = Platform(
    device="cpu",
    environment={
        "VLLM_CPU_ATTN_SPLIT_KV": ("0", "attention splits the keys by how many requests there are"),
    },
    before_config=before_config,
    prepare=_permit_amx,
    switches=(_plain_linear, _softmax_routing, _sum_over_ranks),
    check_model=check_routing,
    divides_invariantly=True,
)
