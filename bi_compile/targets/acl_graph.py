"""The lengths of attention's requests, on the device. In a captured ACL graph vllm-ascend's graph-update task writes them anew.

vllm-ascend captures attention between `torch.npu.graph_task_group_begin` and `_end`. Before the graph goes on to it in a
replay, it calls the operator once more with the step's lengths between `graph_task_update_begin` and `_end`, on a stream of its
own, and records the event that the graph waits for (vllm_ascend/attention/attention_v1.py and mla_v1.py, update_graph_params).
CANN then changes the arguments of its captured kernel. A Triton kernel takes its lengths from a tensor instead: the first
call makes it, the later ones fill it, on that same stream.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


class Task:
    """The attention of one layer in one captured graph. `lengths`: int32 [2, requests], on the device."""

    def __init__(self) -> None:
        self.lengths: Tensor | None = None


#: the task that is captured now, and the one that is updated now
_captured: Task | None = None
_updated: Task | None = None
#: the lengths that were last brought to a device, and what holds them there: all layers of a step ask for the same
_last: tuple[Any, Tensor] | None = None


def graph_task_group_begin(stream: Any) -> None:
    global _captured
    _captured = Task()


def graph_task_group_end(stream: Any) -> Task:
    """The captured task, in place of CANN's handle."""
    global _captured
    task, _captured = _captured, None
    if task is None or task.lengths is None:
        raise RuntimeError(
            "bi_compile: an ACL graph captured a group of tasks without an attention operator that bi_compile replaces, so its "
            'arguments would stay as they were: set compilation_config={"cudagraph_mode": "PIECEWISE"}'
        )
    return task


def graph_task_update_begin(stream: Any, handle: Task) -> None:
    global _updated
    _updated = handle


def graph_task_update_end(stream: Any) -> None:
    global _updated
    _updated = None


def is_captured() -> bool:
    """Whether a group of tasks is captured now."""
    return _captured is not None


def is_update() -> bool:
    """Whether the call only brings the lengths of a captured task up to date."""
    return _updated is not None


def lengths(ends: Sequence[int], keys: Sequence[int], packed: bool, device: torch.device) -> Tensor:
    """Ends of the requests' tokens and numbers of their keys (`packed`: ends), int32 [2, requests], on the device.

    In a capture the tensor belongs to the graph; in an update it is the captured one, filled with these numbers. Requests that
    the captured step has more of get no tokens and no keys.

    Raises:
        ValueError: an update names more requests than were captured.
    """
    if _updated is not None:
        assert _updated.lengths is not None
        room = _updated.lengths.shape[1]
        if len(ends) > room:
            raise ValueError(
                f"npu_fused_infer_attention_score: an update of a captured graph names {len(ends)} requests, and {room} were captured"
            )
        more = room - len(ends)
        ends = [*ends, *[ends[-1] if ends else 0] * more]
        keys = [*keys, *[keys[-1] if packed and keys else 0] * more]
        _updated.lengths.copy_(_on_host(ends, keys, device), non_blocking=device.type == "npu")
        return _updated.lengths
    if _captured is not None:
        # only memory: an operator that fills it would be part of the graph, and undo the update in each replay
        _captured.lengths = torch.empty(2, len(ends), dtype=torch.int32, device=device)
        return _captured.lengths
    return _of_step(ends, keys, device)


def _of_step(ends: Sequence[int], keys: Sequence[int], device: torch.device) -> Tensor:
    """Copied by the first layer of a step on its stream, and found again by the others. Nobody writes into it."""
    global _last
    if detect_fake_mode() is not None:
        return _on_host(ends, keys, device).to(device)
    asked = (*ends,), (*keys,), device, torch.get_device_module(device.type).current_stream(device)
    last = _last
    if last is not None and last[0] == asked:
        return last[1]
    found = _on_host(ends, keys, device).to(device, non_blocking=device.type == "npu")
    _last = asked, found
    return found


def zero(like: Tensor) -> Tensor:
    """[1], in the place of a logsumexp that nobody asked for; made once on each device, unless a graph is traced or captured."""
    if detect_fake_mode() is not None or is_captured():
        return like.new_zeros(1)
    return _zero(like.dtype, like.device)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode that asks first
        return torch.zeros(1, dtype=dtype, device=device)


def _on_host(ends: Sequence[int], keys: Sequence[int], device: torch.device) -> Tensor:
    """In memory that the device copies from while the host goes on."""
    return torch.tensor([[*ends], [*keys]], dtype=torch.int32, pin_memory=device.type == "npu")
