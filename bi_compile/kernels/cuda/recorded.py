"""What an operator's function in Triton allocates and launches at the second call with such arguments, told to `recorded.cpp`, which does
just that for every later one.

Such arguments: of the same sizes, strides, dtypes and numbers, on the same device, all tensors aligned, and the same of them at one address.
Nothing else decides what these functions do; where one reads what a tensor holds, or computes anything by other means than a launch, its calls
stay with Python.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import triton
from ..triton.launch import Launched, watching
from .launches import described, warn_of

log = logging.getLogger("bi_compile")

_ALLOCATES = frozenset(
    {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_strided.default}
)


class _Inside(TorchDispatchMode):
    """What is allocated in the block, and an operator that does more than that or a view; kept, so that no address comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.other = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATES:
            self.made.append(out)
        elif not func.is_view:
            self.other = str(func)
        return out


def recording(
    given: Sequence[Tensor], out: Any, inside: _Inside, seen: Sequence[Launched]
) -> tuple[list[Tensor], list[int], list[list[int]]]:
    """Results, rooms and launches of a call, as `record` in recorded.cpp takes them.

    Raises:
        ValueError: the call did something else, or launched on memory that is neither given nor allocated inside.
    """
    if inside.other:
        raise ValueError(f"it calls {inside.other}")
    if not seen:
        raise ValueError("it launches nothing")
    results = out if isinstance(out, tuple) else (out,)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in inside.made}
    for result in results:
        plain = torch.empty(result.shape, device="meta").stride()
        if result.stride() != plain or storages.pop(result.data_ptr(), None) != result.nbytes:
            raise ValueError("a result is not what was allocated for it")
    rooms = {at: size for at, size in storages.items() if size}
    addresses = [*(x.data_ptr() for x in (*given, *results)), *rooms]

    def slot_of(_: int, x: Tensor) -> int | None:
        return addresses.index(x.data_ptr()) if x.data_ptr() in addresses else None

    launches = [described(launched, slot_of, exact=True) for launched in seen]
    return list(results), [*rooms.values()], launches


def _recorded(name: str) -> Callable[..., Any]:
    function = triton.IMPLEMENTATIONS[name]

    @functools.wraps(function)
    def run(*args: Any, recording_key: Sequence[int], **options: Any) -> Any:
        if not recording_key:
            return function(*args, **options)
        with watching() as seen, _Inside() as inside:
            out = function(*args, **options)
        given = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
        try:
            torch.ops.bi_compile_cuda.record(recording_key, *recording(given, out, inside, seen))
            return out
        except ValueError as error:
            log.debug("bi_compile: %s keeps its calls in Python: %s", name, error)
        except RuntimeError as error:
            warn_of(name, str(error).partition("\n")[0])
        torch.ops.bi_compile_cuda.record(recording_key, [], [], [])
        return out

    return run


def operators(names: Iterable[str]) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Of what `recorded.cpp` calls in Python for these operators: name, schema and function."""
    for name in names:
        arguments, returns = str(getattr(torch.ops.bi_compile, name).default._schema).split("(", 1)[1].split(") -> ")
        by_name = "" if "*, " in arguments else "*, "
        yield (
            f"record_{name}",
            f"record_{name}({arguments}, {by_name}int[] recording_key) -> {returns}",
            _recorded(name),
        )
