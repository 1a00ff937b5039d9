"""How an operator is declared: one function gives schema, flow of the batch, documentation and fake implementation.

The function under `@operator(schema, batch=…)` is the operator's fake implementation: it gets fake tensors, checks them and
returns empty tensors of the right size, dtype and strides. Its docstring is the operator's documentation. `batch` says how
the batch flows through it (see `batch`). What the decorator returns is the operator, an OpOverload.

The implementations live in `bi_compile.kernels`, one for each device, and are loaded at the first call on that device:
importing this package compiles nothing.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree

from .batch import Batch

NAMESPACE = "bi_compile"
#: device -> (dispatch key, module whose `register(library)` gives every operator its implementation under that key); what is
#: known of a device stands in `bi_compile.targets`, which fills this in when the package is imported
KERNELS: dict[str, tuple[str, str]] = {}
#: operators written with other operators, for every device whose kernels do not have them
COMPOSITE: dict[str, Callable[..., Any]] = {}
#: every operator of this package by name
OPERATORS: dict[str, torch._ops.OpOverload] = {}
#: how the batch flows through each
BATCH: dict[str, Batch] = {}

_library = torch.library.Library(NAMESPACE, "DEF")
_loaded: dict[str, torch.library.Library] = {}
_loading = threading.RLock()


def check(condition: Any, message: Callable[[], str]) -> None:
    """`torch._check`, which costs a kernel's every call some microseconds, only where the condition is symbolic or fails."""
    if condition is not True:
        torch._check(condition, message)


def load_kernels(device: str) -> None:
    """Load (on a CPU: compile, if that was not done before) the kernels for `device` ("cpu", "cuda", "npu").

    From then on a call goes from the dispatcher straight to the kernel. Loading twice does nothing.

    Raises:
        ValueError: no kernels exist for that device.
        RuntimeError: the kernels cannot be had here; the message says what is missing.
    """
    if device not in KERNELS:
        raise ValueError(f"bi_compile has no kernels for the device {device!r}; it has them for {', '.join(KERNELS)}")
    if device in _loaded:
        return
    with _loading:
        if device not in _loaded:
            _loaded[device] = _load(*KERNELS[device])


def _load(key: str, module: str) -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "IMPL")
    try:
        importlib.import_module(module).register(library)
        for name, implementation in COMPOSITE.items():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
                library.impl(name, implementation, key)
    except BaseException:
        library._destroy()
        raise
    importlib.import_module("bi_compile.kernels.calls").shorten(OPERATORS.values())
    return library


def _register_first_call(name: str) -> None:
    """Under a key that counts only where the device has no kernel: so it can stay, and no thread loses the kernel it is in."""

    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device.type for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        load_kernels(device)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", KERNELS[device][0]):
            raise NotImplementedError(f"{NAMESPACE}::{name} has no kernel for the device {device!r}")
        return OPERATORS[name](*args, **kwargs)

    _library.impl(name, run, "CompositeExplicitAutograd")


def composite(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function computes the operator `name` with other operators, on every device that has no kernel for it."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        COMPOSITE[name] = implementation
        return implementation

    return register


class Operator(Protocol):
    """What `@operator` makes of a function: the operator."""

    meta: Callable[..., Any]
    """The fake implementation by itself: checks the arguments (of any device) and returns empty results like them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def operator(schema: str, *, batch: Batch) -> Callable[[Callable[..., Any]], Operator]:
    """Declare `bi_compile::<schema>`; the decorated function is its fake implementation and its documentation.

    batch: how the batch flows through it, which the audit follows.
    """
    name = schema.split("(")[0]

    def declare(fake: Callable[..., Any]) -> Operator:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        _register_first_call(name)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        OPERATORS[name], BATCH[name] = op, batch
        op.meta, op.__doc__, op.__signature__ = fake, fake.__doc__, inspect.signature(fake)
        return op

    return declare
