"""What a target is made of: a `Target`, what is known where a graph runs, and its `Device`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import fx

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
    """Native operators (`ns::packet`) about which nothing is known, each with what would be needed."""
    inductor: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Settings of Inductor (`torch._inductor.config`) that the guarantee needs."""
    native: Callable[[], Mapping[str, str]] = dict
    """What its kernels rest on besides this package, and by what proof, for certificates."""
    before_codegen: Callable[[fx.Graph], None] | None = None
    """Called with each graph that Inductor is about to generate code for, once the passes are done with it."""
    code_for: Callable[[], str] = str
    """What the generated code is made for beside the graph, where the compiler's own cache takes no account of it."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A device type with its kernels and targets."""

    name: str
    """torch's name of the device type."""
    dispatch_key: str
    """PyTorch's dispatch key of its tensors."""
    kernels: str
    """The module whose `register(library)` gives every operator its kernel under that key; imported at the first call."""
    targets: tuple[Target, ...]
    here: Callable[[bool], Target]
    """The target of this machine, with Inductor as its compiler (True) or without a compiler. May raise HostError."""
