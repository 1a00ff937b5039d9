"""What the engines of one process have in common: the first that needs a setting makes it, the last takes it back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from vllm import envs

from ..errors import HostError

T = TypeVar("T")


@dataclasses.dataclass
class _Setting:
    value: Any
    undo: contextlib.ExitStack
    users: int = 0


_lock = threading.RLock()
_settings: dict[Hashable, _Setting] = {}


@contextlib.contextmanager
def shared(key: Hashable, make: Callable[[], contextlib.AbstractContextManager[T]]) -> Iterator[T]:
    """`make()`, entered by the first of those who hold `key` at a time, and left with the last of them.

    They may leave in any order, so what is made under one key may not lie on top of what is made under another.
    """
    with _lock:
        setting = _settings.get(key)
        if setting is None:
            undo = contextlib.ExitStack()
            setting = _settings[key] = _Setting(undo.enter_context(make()), undo)
        setting.users += 1
    try:
        yield setting.value
    finally:
        with _lock:
            setting.users -= 1
            if not setting.users:
                del _settings[key]
                setting.undo.close()


@contextlib.contextmanager
def environment(name: str, value: str, why: str) -> Iterator[None]:
    """The environment variable `name` is `value`, also where vLLM has read it already.

    Raises:
        HostError: vLLM goes on with another value.
    """
    before = os.environ.get(name)
    _set(name, value)
    try:
        _read_back(name, value, why)
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
    # once an engine has started vLLM reads no variable again; it forgets them itself when an engine ends, and an engine that
    # starts has it keep them once more
    envs.disable_envs_cache()


def _read_back(name: str, value: str, why: str) -> None:
    if name not in envs.environment_variables:
        return  # not vLLM's: a library reads it from the environment
    found, needed = getattr(envs, name), envs.environment_variables[name]()
    if found != needed:
        raise HostError(
            f"vllm.envs.{name} stays {found!r} in this process although {name}={value} is set, and {why}: start the engine in a "
            "process of its own"
        )


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def layers_of_its_own() -> Iterator[None]:
    """A model that is loaded in the block shares no layer with the other models of the process.

    vLLM keeps rotary embeddings and activations as the first model made them, with its choice between a fused kernel and
    PyTorch code.
    """
    from vllm.model_executor.layers import activation, rotary_embedding

    with contextlib.ExitStack() as stack:
        stack.enter_context(attribute(rotary_embedding, "_ROPE_DICT", {}))
        for registry in (activation._ACTIVATION_REGISTRY, activation._ACTIVATION_AND_MUL_REGISTRY):
            stack.enter_context(attribute(registry, "_dict", {}))
        yield
