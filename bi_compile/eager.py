"""The eager fallback: the same table at the dispatcher, for code that is not compiled (lm_head, the sampler, a graph break).

Every operator of the table gets its replacement as the kernel of the target's dispatch key, below autograd: gradients are
PyTorch's own. `torch.sum`, `Tensor.sum`, `out=` and in-place forms all arrive at the dispatcher, so each keeps every
meaning of its arguments.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload

from .ops import KERNELS, load_kernels
from .options import Options, resolve_passes
from .table import Entry, Replacement, Table
from .targets import for_device

if TYPE_CHECKING:
    from .eager_audit import Observed

_lock = threading.RLock()
_active = threading.local()
_installed: list[EagerFallback] = []


class EagerFallback:
    """Table entries installed at the dispatcher until `remove()`."""

    def __init__(self, options: Options, device: str) -> None:
        self.device = device
        self.table = Table(resolve_passes(options.passes), for_device(device, compiled=False).name)
        self._libraries: dict[str, torch.library.Library] = {}
        self.seen: Observed | None = None
        """What the audit of `invariant(audit=True)` saw."""

    @property
    def operators(self) -> list[str]:
        """The overloads that are replaced at the dispatcher while installed."""
        return sorted(
            str(op) for op, (entry, _) in self.table.by_overload.items() if entry.eager and self._has_kernel(op)
        )

    def _has_kernel(self, op: OpOverload) -> bool:
        """Not so a composite that autograd sees through: it calls others, which are in the table themselves."""
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return any(has(op.name(), key) for key in (KERNELS[self.device][0], "CompositeExplicitAutograd"))

    def _install(self) -> None:
        load_kernels(self.device)
        key = KERNELS[self.device][0]
        library = torch.library.Library("aten", "IMPL")
        libraries = {"aten": library}
        try:
            for op, (entry, replacement) in self.table.by_overload.items():
                if not entry.eager or not self._has_kernel(op):
                    continue
                original = torch.library.get_kernel(op, key)
                ns = libraries.setdefault(
                    op.namespace, library if op.namespace == "aten" else torch.library.Library(op.namespace, "IMPL")
                )
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
                    ns.impl(
                        op.name().partition("::")[2],
                        _kernel(op, entry, replacement, original),
                        key,
                        with_keyset=True,
                        allow_override=True,
                    )
        except BaseException:
            for lib in libraries.values():
                lib._destroy()
            raise
        self._libraries = libraries

    def _uninstall(self) -> None:
        for library in self._libraries.values():
            library._destroy()
        self._libraries = {}

    def remove(self) -> None:
        """Give the operators back. Removing twice does nothing; the order of removal does not matter."""
        with _lock:
            if self not in _installed:
                return
            # the dispatcher's overrides are a stack: take off those above, and put them back
            above = _installed[_installed.index(self) + 1 :]
            for fallback in [*reversed(above), self]:
                fallback._uninstall()
            _installed.remove(self)
            for fallback in above:
                fallback._install()


def _kernel(op: OpOverload, entry: Entry, replacement: Replacement, original: Any) -> Callable[..., Any]:
    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        inside = _active.__dict__.setdefault("operators", set())
        # a replacement that calls its own operator means the native one
        if op in inside or entry.stays(*args, **kwargs):
            return original.call_boxed(keyset, *_numbers_as_tensors(op, args), **kwargs)
        inside.add(op)
        try:
            return replacement(*args, **kwargs)
        finally:
            inside.discard(op)

    return run


def _numbers_as_tensors(op: OpOverload, args: tuple[Any, ...]) -> Iterator[Any]:
    """PyTorch hands a number that stands for a tensor to a Python kernel as the number, but takes only a tensor back."""
    for value, argument in zip(args, op._schema.arguments, strict=False):
        is_number = isinstance(value, (int, float, complex)) and isinstance(argument.type, torch.TensorType)
        yield torch.scalar_tensor(value, dtype=torch.tensor(value).dtype) if is_number else value


def replaced_by(op: Any, device: str) -> Entry | None:
    """The entry of the table by which an installed fallback replaces `op` on `device` now."""
    for fallback in reversed(_installed):
        found = fallback.table.get(op) if fallback.device == device else None
        if found is not None and found[0].eager and fallback._has_kernel(op):
            return found[0]
    return None


def install(options: Options | None = None, device: str = "cpu") -> EagerFallback:
    """Replace the table's operators for every tensor on `device` in this process, until `.remove()`.

    Raises:
        OptionError, TableError, RuntimeError: as `Options`, `Table` and `load_kernels` do; then nothing is installed.
    """
    fallback = EagerFallback(options or Options(), device)
    with _lock:
        fallback._install()
        _installed.append(fallback)
    return fallback


@contextlib.contextmanager
def invariant(options: Options | None = None, device: str = "cpu", audit: bool = False) -> Iterator[EagerFallback]:
    """`install` for the length of a with-block.

    Args:
        audit: judge every operator that this thread calls in the block (`eager_audit.judged`); `.seen` holds what it saw.

    Raises:
        AuditError: with `audit`, an operator that is not known to be invariant.
    """
    fallback = install(options, device)
    try:
        if not audit:
            yield fallback
            return
        from .eager_audit import judged

        with judged(options, device) as fallback.seen:
            yield fallback
    finally:
        fallback.remove()
