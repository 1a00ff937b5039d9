"""vLLM on a CPU: linear layers stay products that the passes can see, and attention does not split the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import HostError
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


PLATFORM = Platform(
    device="cpu",
    environment={
        "VLLM_CPU_ATTN_SPLIT_KV": ("0", "attention splits the keys by how many requests there are"),
    },
    prepare=_permit_amx,
    switches=(_plain_linear,),
)
