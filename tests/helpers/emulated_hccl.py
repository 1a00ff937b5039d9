"""HCCL on the emulated NPU, stood in for by gloo: a device's memory is the host's, so gloo's collectives work on it in place.

HCCL's own order of sums is not emulated. Two ranks have one order; for more, HCCL_DETERMINISTIC=strict is taken at its word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated_graph
import torch
import torch.distributed as dist
from emulated_npu import LAUNCHES, host, library
from torch import Tensor
from torch.utils._pytree import tree_map

#: operators of c10d that are computed; torch would hand the others to gloo past the emulation, so they raise
COLLECTIVES = (
    "allreduce_", "allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_", "broadcast_", "_reduce_scatter_base_",
    "alltoall_base_", "barrier",
)  # fmt: skip


def _on_host(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        LAUNCHES[f"c10d::{name}"] += 1
        down = lambda x: host(x) if isinstance(x, Tensor) and x.device.type == "npu" else x
        on_host, options = tree_map(down, args), tree_map(down, kwargs)
        result = operator(*on_host, **options)
        # its own tensors in place of those of the host, in which the collective has written
        result = (args[0], result[1]) if isinstance(result, tuple) else result

        def again() -> None:
            LAUNCHES[f"c10d::{name}"] += 1
            found = operator(*on_host, **options)
            (found[1] if isinstance(found, tuple) else found).wait()

        again.memory = args  # type: ignore[attr-defined]  # kept as long as the graph
        emulated_graph.note(again)
        return result

    return run


def _refused(name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"c10d::{name} is not emulated: tests/helpers/emulated_hccl.py computes {COLLECTIVES}"
        )

    return run


def install() -> None:
    """After `import torch_npu`, which registers its own backend, and before a process group is made."""
    make = lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout)
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(make, False)
    dist.Backend.backend_capability["hccl"] = ["cpu", "npu"]
    c10d = library("c10d")
    for whole in torch._C._dispatch_get_all_op_names():
        name = whole.removeprefix("c10d::")
        if name != whole and torch._C._dispatch_has_kernel_for_dispatch_key(whole, "PrivateUse1"):
            run = _on_host(name) if name in COLLECTIVES else _refused(name)
            c10d.impl(name, run, "PrivateUse1", allow_override=True)
