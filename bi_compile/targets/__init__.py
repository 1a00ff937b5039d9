"""Targets: the device and compiler that run a graph, and what is known there.

A target is one file that holds one `TARGET`; a new target is a file here and its line in `TARGETS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

#: What Inductor fuses follows the shapes, and fused code keeps more digits than code that stores in between: a low-precision
#: value is not rounded, and a product and a sum become one fused multiply-add. With this every value is rounded as its own
#: operator would round it, fused or not.
ROUND_EVERY_OPERATOR: Mapping[str, object] = {"emulate_precision_casts": True}


@dataclasses.dataclass(frozen=True)
class Target:
    """What is known of a device."""

    name: str
    device: str
    """torch's name of the device type."""
    trusted: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Native operators (`ns.packet.overload`) that are invariant here, each with its reason."""
    row_local: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Native operators of this device (`ns::packet`) that are row-local by their meaning, each with what that is."""
    unproven: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Native operators (`ns::packet`) of which nothing is known, each with what would be needed."""
    inductor: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Settings of Inductor (`torch._inductor.config`) that the guarantee needs."""


def _targets() -> dict[str, Target]:
    from . import ascend, cpu, cuda

    return {t.name: t for t in (cpu.TARGET, cpu.EAGER, cuda.TARGET, ascend.A2, ascend.A3, ascend.A950)}


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        OptionError: there is none; the message lists those that there are.
    """
    from ..errors import OptionError

    targets = _targets()
    if name not in targets:
        raise OptionError(f"unknown target {name!r}: known are {', '.join(sorted(targets))}")
    return targets[name]


def for_device(device: str, compiled: bool) -> Target:
    """The target of a device ("cpu", "cuda", "npu"), with Inductor as its compiler or without a compiler.

    Raises:
        HostError: an NPU that is not supported, or whose software is not.
    """
    if device == "npu":
        from .ascend import of_this_machine

        return of_this_machine()
    eager = f"{device}_eager"
    return get_target(eager if not compiled and eager in _targets() else device)
