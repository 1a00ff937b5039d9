"""A TEST BENCH, no part of the product: ACL graphs of the emulated NPU.

A capture notes what the device is given to do, by the memory that it reads and writes, and a replay does it again. (In the
capture itself, native operators compute too, which an NPU's do not: their results' shapes are wanted. Triton kernels do not.) Numbers that
the host has read stay as they were, and a copy between host and device in a capture is an error, as on an NPU. A replay stops
where the graph waits for an `ExternalEvent` and goes on when that is recorded, so what vllm-ascend's update tasks bring in
between is seen, and in their order. A group of tasks holds the native operators that an update changes the arguments of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

#: what the device was given to do so far, by name, in replays too: native operators, copies, Triton kernels, collectives; views and
#: allocations are nothing
LAUNCHES: Counter[str] = Counter()
#: a step of a graph: what is done, or the event that has to be recorded first
Step = Callable[[], Any] | Any


class Native:
    """A native operator in a graph: function, arguments, where its results go, and the tensors whose memory these are."""

    def __init__(
        self, name: str, function: Callable[..., Any], args: Any, kwargs: Any, results: list[Any], owners: Any
    ) -> None:
        self.owners = owners
        self.name, self.function, self.args, self.kwargs, self.results = name, function, args, kwargs, results

    def __call__(self) -> None:
        LAUNCHES[self.name] += 1
        found = torch.utils._pytree.tree_leaves(self.function(*self.args, **self.kwargs))
        for to, result in zip(self.results, found, strict=True):
            if to is not None and to is not result:
                to.copy_(result)


class Graph:
    """`torch.npu.NPUGraph`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.rest: Iterator[Step] = iter(())
        self.waits: Event | None = None

    def replay(self) -> None:
        assert self.waits is None, "a graph that still waits for an event is replayed"
        self.rest = iter(self.steps)
        self.go_on()

    def go_on(self) -> None:
        self.waits = None
        for step in self.rest:
            if isinstance(step, Event) and not step.recorded:
                self.waits, step.waiting = step, self
                return
            if not isinstance(step, Event):
                with _disable_current_modes():  # the host calls nothing in a replay, so nobody is asked
                    step()

    def reset(self) -> None:
        self.steps = []


class Event:
    """`torch.npu.ExternalEvent`."""

    def __init__(self) -> None:
        self.recorded = False
        self.waiting: Graph | None = None

    def wait(self, stream: Any) -> None:
        note(self)

    def reset(self, stream: Any) -> None:
        note(lambda: setattr(self, "recorded", False))

    def record(self, stream: Any) -> None:
        self.recorded = True
        if self.waiting is not None:
            graph, self.waiting = self.waiting, None
            graph.go_on()


_capture: Graph | None = None
#: where the group of tasks begins that is captured now; the group that is updated now
_group: int = 0
_update: Iterator[Native] | None = None
#: graphs captured, and replays, for the tests
COUNTS = {"captured": 0, "replayed": 0}


def capturing() -> bool:
    return _capture is not None


def updating(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the call only changes the arguments of a captured operator; then it has done so."""
    if _update is None or "get_max_workspace" in name:
        return False
    task = next(task for task in _update if task.name == name)
    task.args, task.kwargs = args, kwargs
    return True


def note(step: Step) -> None:
    if _capture is not None:
        _capture.steps.append(step)


class graph:
    """`torch.npu.graph`."""

    def __init__(self, npu_graph: Graph, *args: Any, **kwargs: Any) -> None:
        self.graph = npu_graph

    def __enter__(self) -> None:
        global _capture
        _capture = self.graph
        COUNTS["captured"] += 1

    def __exit__(self, *args: object) -> None:
        global _capture
        _capture = None


def group_begin(stream: Any) -> None:
    global _group
    assert _capture is not None
    _group = len(_capture.steps)


def group_end(stream: Any) -> list[Native]:
    assert _capture is not None
    return [step for step in _capture.steps[_group:] if isinstance(step, Native)]


def update_begin(stream: Any, handle: list[Native]) -> None:
    global _update
    _update = iter(handle)


def update_end(stream: Any) -> None:
    global _update
    _update = None


def install() -> None:
    """Give torch.npu these graphs."""
    import torch_npu

    def replay(self: Graph) -> None:
        COUNTS["replayed"] += 1
        Graph.replay(self)

    names = {
        "NPUGraph": type("NPUGraph", (Graph,), {"replay": replay}), "graph": graph, "ExternalEvent": Event,
        "is_current_stream_capturing": capturing, "graph_task_group_begin": group_begin, "graph_task_group_end": group_end,
        "graph_task_update_begin": update_begin, "graph_task_update_end": update_end, "graph_pool_handle": lambda: (0, 0),
    }  # fmt: skip
    for module in (torch.npu, torch_npu.npu, torch_npu.npu.graphs):
        for name, value in names.items():
            setattr(module, name, value)
    torch_npu._C._weak_ref_tensor = lambda tensor: tensor
