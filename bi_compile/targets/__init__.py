"""Targets: the device and compiler that run a graph, and what is known there.

All that is known of a device stands in one file, which holds one `DEVICE`: its dispatch key, its kernels' module, its targets,
and which of them this machine is. A new device is a file here and its line in `DEVICES`; its kernels' tiles stand with the
kernels.
"""

from __future__ import annotations

from .. import ops
from ..errors import OptionError, meant
from . import ascend, cpu, cuda
from .target import ROUND_EVERY_OPERATOR, Device, Target

__all__ = ["DEVICES", "ROUND_EVERY_OPERATOR", "TARGETS", "Device", "Target", "for_device", "get_target"]

#: torch's name of the device type -> what is known of it
DEVICES = {device.name: device for device in (cpu.DEVICE, cuda.DEVICE, ascend.DEVICE)}
TARGETS = {target.name: target for device in DEVICES.values() for target in device.targets}

for _device in DEVICES.values():
    ops.KERNELS[_device.name] = (_device.dispatch_key, _device.kernels)


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        OptionError: there is none; the message lists those that there are.
    """
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}{meant(name, TARGETS)}: known are {', '.join(sorted(TARGETS))}")
    return TARGETS[name]


def for_device(device: str, compiled: bool) -> Target:
    """The target of a device ("cpu", "cuda", "npu"), with Inductor as its compiler or without a compiler.

    Raises:
        OptionError: there is no target for that device.
        HostError: an NPU that is not supported, or whose software is not.
    """
    return DEVICES[device].here(compiled) if device in DEVICES else get_target(device)
