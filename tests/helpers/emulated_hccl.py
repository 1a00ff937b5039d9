"""HCCL on the emulated NPU, stood in for by gloo: a device's memory is the host's, so gloo's collectives work on it in place.

HCCL's own order of sums is not emulated. Two ranks have one order; for more, HCCL_DETERMINISTIC=strict is taken at its word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from emulated_npu import LAUNCHES, host, library
from torch import Tensor
from torch.utils._pytree import tree_map

#: operators of c10d that are computed; any other finds no backend for the device and raises
COLLECTIVES = (
    "allreduce_", "allgather_", "_allgather_base_", "broadcast_", "reduce_scatter_", "_reduce_scatter_base_", "alltoall_base_", "alltoall_",
    "gather_", "scatter_", "send", "recv_", "barrier",
)  # fmt: skip


def _on_host(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        LAUNCHES[f"c10d::{name}"] += 1
        down = lambda x: host(x) if isinstance(x, Tensor) and x.device.type == "npu" else x
        result = operator(*tree_map(down, args), **tree_map(down, kwargs))
        # its own tensors in place of those of the host, in which the collective has written
        return (args[0], result[1]) if isinstance(result, tuple) else result

    return run


def install() -> None:
    """After `import torch_npu`, which registers its own backend, and before a process group is made."""
    make = lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout)
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(make, False)
    dist.Backend.backend_capability["hccl"] = ["cpu", "npu"]
    c10d = library("c10d")
    for name in COLLECTIVES:
        c10d.impl(name, _on_host(name), "PrivateUse1", allow_override=True)
