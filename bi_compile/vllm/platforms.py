"""What an engine needs on each of vLLM's platforms: a module here holds one `PLATFORM`; a new platform is a module and its line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import HostError
from ..options import Options
from .inductor import VllmPass

#: vLLM's name of the device type -> module
MODULES = {"cpu": "cpu", "cuda": "cuda", "npu": "ascend"}
Switch = contextlib.AbstractContextManager[None]


def _nothing(vllm_config: Any) -> None:
    """What most platforms need at most places."""


@dataclasses.dataclass(frozen=True)
class Platform:
    """One of vLLM's platforms. What is called gets the engine's VllmConfig and may raise HostError."""

    device: str
    """vLLM's, and torch's, name of the device type."""
    environment: Mapping[str, tuple[str, str]]
    """Environment variables that the guarantee needs: value, and why."""
    before_config: Callable[[Any], None] = _nothing
    """What has to be settled before the platform reads the configuration."""
    prepare: Callable[[Any], None] = _nothing
    """What is checked and loaded for each worker, before its model loads."""
    switches: Sequence[Callable[[], Switch]] = ()
    """What is switched in a process before the first such worker's model loads, and taken back with the last worker."""
    check_model: Callable[[Any], None] = _nothing
    """What can only be checked in a worker once its model is there."""
    make_pass: Callable[[Options, Any], VllmPass] = VllmPass
    """Options and a pass of the user's -> the pass for the compilation config."""
    own_operators_in_table: bool = False
    """Whether the table has the platform's own operators; where it has not, vLLM runs its plain PyTorch code instead."""
    divides_invariantly: bool = False
    """Whether the option `tp_invariant` was tried there."""
    refuses_uncompiled: bool = True
    """Whether an operator that runs outside of graphs and is not known to be invariant stops the engine, as on_unproven="error" asks.
    Where what vLLM calls there was read in its source and not tried on a device, it is named in a warning instead."""


def current() -> Platform:
    """The platform of this process.

    Raises:
        HostError: there is nothing for it.
    """
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device not in MODULES:
        raise HostError(
            f"bi_compile has no target for vLLM's platform {device!r}: it has {', '.join(MODULES)}; remove custom_passes from the "
            "compilation config"
        )
    platform: Platform = importlib.import_module(f".{MODULES[device]}", __package__).PLATFORM
    return platform


def attention_layers(vllm_config: Any) -> Iterator[tuple[str, Any]]:
    """Name and implementation of each layer that has keys and values, or a state, of its own, in a worker's model.

    vLLM cuts its graphs at them (`splitting_ops`) and calls them between the parts, where no audit sees them. The implementation
    is None where a layer has no attention.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if isinstance(layer, AttentionLayerBase):
            yield name, getattr(layer, "impl", None)
