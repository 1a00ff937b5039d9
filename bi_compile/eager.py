"""The eager fallback: the same table at the dispatcher, for code that is not compiled (lm_head, the sampler, a graph break).

Every operator of the table gets its replacement as the kernel of the device's dispatch key, below autograd: gradients are
PyTorch's own. `torch.sum`, `Tensor.sum`, `out=` and in-place forms all arrive at the dispatcher, so each keeps every
meaning of its arguments. Operators that are known to vary and have no replacement (`REFUSED`) are refused by name.

A device's library may register an operator for itself that PyTorch composes of others (torch_npu: softmax.int, matmul, cdist, lstm and
some 40 more), and what its own kernel calls never comes past the dispatcher. Such an operator, unless it is in the table, is
taken apart as PyTorch takes it apart, and the parts meet the table (`EagerFallback.apart`).

A product, a softmax, a sum or a norm is replaced by an operator with the same arguments, so the dispatcher is told to call that at once
(`kernels.calls`): a kernel in Python costs the host 4 us a call. On a CPU so are pointwise functions, which threads share there.

It holds for every thread of the process. Our kernels are put in at the first use and stay, because the dispatcher must not
lose a kernel that another thread is in; each looks up what is installed at the moment, and calls PyTorch's own where nothing
is. So a fallback may be installed and removed at any time, in any order, from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch._ops import OpOverload

from .audit.spec import ALLOWED, Call, Knowledge, judge
from .errors import AuditError, OptionError
from .kernels import calls
from .ops import KERNELS, OPERATORS, load_kernels
from .options import Options
from .passes import PASSES, LayerNorm, Matmul, Pointwise, Reductions, RmsNorm, Softmax
from .passes.pointwise import WHOLE
from .refused import REFUSED, REFUSED_SPARSE, SPARSE_KEYS
from .resolve import resolve
from .table import Entry, Replacement, Table, find_operator
from .targets import for_device
from .user_code import place

if TYPE_CHECKING:
    from .eager_audit import Observed

log = logging.getLogger("bi_compile")

#: operators that do nothing but call another, with the same arguments, which meets the table
CALLS: dict[str, OpOverload] = dict.fromkeys(
    ("aten.index_put.default", "aten.index_put_.default", "aten._unsafe_index_put.default"),
    torch.ops.aten._index_put_impl_.default,
)

_lock = threading.RLock()
#: what is installed, the oldest first; exchanged as a whole, so that a thread sees one state or the other
_installed: tuple[EagerFallback, ...] = ()
#: the operators that have a kernel of ours, for good, with the libraries that hold them
_kernels: set[tuple[OpOverload, str]] = set()
"""(operator, dispatch key)"""
_libraries: dict[str, torch.library.Library] = {}


_aten = torch.ops.aten
#: operators that these passes replace by one of ours with the same arguments, but for how `redirect.cpp` says them
_SAME_ARGUMENTS: dict[OpOverload, OpOverload] = {
    op: OPERATORS[name]
    for op, name in (
        (_aten.mm.default, "mm"),
        (_aten.addmm.default, "addmm"),
        (_aten.bmm.default, "bmm"),
        (_aten.baddbmm.default, "baddbmm"),
        (_aten._softmax.default, "softmax"),
        (_aten._log_softmax.default, "log_softmax"),
        (_aten.sum.dim_IntList, "sum"),
        (_aten.mean.dim, "mean"),
        (_aten.cumsum.default, "cumsum"),
        (_aten.native_layer_norm.default, "layer_norm"),
        (_aten._fused_rms_norm.default, "rms_norm"),
    )
}
_THEIR_ENTRIES = frozenset(
    id(entry) for every in (Matmul, Softmax, Reductions, LayerNorm, RmsNorm, Pointwise) for entry in every.entries
)
#: pointwise functions of a CPU, which run on whole vectors; those of numbers PyTorch computes by those of tensors
_WHOLE = frozenset(op for op in map(find_operator, WHOLE) if op is not None and "Scalar" not in op._overloadname)
_REDIRECTED = frozenset(map(id, (*_SAME_ARGUMENTS, *_WHOLE)))
#: (operator, device) -> what switches its redirection to that (`calls.redirect`)
_switches: dict[tuple[OpOverload, str], int] = {}
#: what was installed when they were last set
_switched_for: tuple[EagerFallback, ...] = ()


class _Active(threading.local):
    def __init__(self) -> None:
        self.operators: set[int] = set()
        """Those within whose replacement this thread is, by their id: an OpOverload is hashed in Python."""
        self.fallbacks: tuple[EagerFallback, ...] = ()
        """Those that are installed for this thread alone (`held`)."""
        self.tracing = False
        """Whether a graph of ours is being traced (`tracing`)."""


_active = _Active()


class EagerFallback:
    """A table at the dispatcher until `remove()`; each `install` gives one of its own, and they do not know each other."""

    def __init__(self, options: Options, device: str) -> None:
        self.options = options
        self.device = device
        resolved = resolve(options)
        if resolved.target is not None and resolved.target.device != device:
            raise OptionError(
                f"target={options.target!r} is a target of {resolved.target.device!r}, not of the device {device!r}"
            )
        self.table = Table(resolved.passes, for_device(device, compiled=False).name)
        key = KERNELS[device][0] if device in KERNELS else ""
        self.replaced: dict[OpOverload, tuple[Entry, Replacement]] = {
            op: found for op, found in self.table.by_overload.items() if found[0].eager and _has_kernel(op, key)
        }
        self.by_id = {id(op): found for op, found in self.replaced.items()}
        """What is replaced, for the kernels, which ask at every call."""
        self.refused: dict[OpOverload, str] = {
            op: why
            for name, why in REFUSED.items()
            if name not in options.trust
            for op in _with_siblings(name)
            if op not in self.replaced and str(op) not in options.trust and _has_kernel(op, key)
        }
        self.apart = self._taken_apart(key) if key == "PrivateUse1" else frozenset()
        """Operators that PyTorch composes and the device's library has a kernel of its own for."""
        self.refused_sparse: dict[OpOverload, str] = {
            op: why
            for name, why in REFUSED_SPARSE.items()
            if name not in options.trust
            for op in _with_siblings(name)
            if str(op) not in options.trust and torch._C._dispatch_has_kernel(op.name())
        }
        self.seen: Observed | None = None
        """What the audit of `invariant(audit=True)` saw."""
        self._warned: set[OpOverload] = set()

    def _taken_apart(self, key: str) -> frozenset[OpOverload]:
        target = for_device(self.device, compiled=False)
        known = Knowledge(target, self.table, Table(PASSES, target.name), self.options.trust)
        return frozenset(
            op
            for op in _of_its_own(key)
            if op not in self.refused and judge(Call(op, (), {}, complete=False), known)[0] not in ALLOWED
        )

    @property
    def operators(self) -> list[str]:
        """The overloads that are replaced at the dispatcher while installed."""
        return sorted(map(str, self.replaced))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put it back for the length of a with-block. A server does so twice for each token, so nothing is looked up again."""
        with _lock:
            _exchange((*_installed, self))
        try:
            yield
        finally:
            self.remove()

    def remove(self) -> None:
        """Give the operators back. Removing twice does nothing; the order of removal does not matter."""
        with _lock:
            _exchange(tuple(f for f in _installed if f is not self))

    def refuse(self, op: OpOverload, args: Any, why: str) -> None:
        """Raise AuditError, or say it once, that `op` varies; not so for integers, nor in a backward pass."""
        if exact(op, *args) or torch._C._current_graph_task_id() != -1:
            return
        message = f"{op} is not batch-invariant and has no replacement: {why} — {place()}"
        if self.options.on_unproven == "error":
            name = op.name().removesuffix(".default")
            raise AuditError(f'{message}; if it is invariant for you, say so and why: trust={{"{name}": "the reason"}}')
        if op not in self._warned:
            self._warned.add(op)
            log.warning("bi_compile: %s", message)
            warnings.warn(f"bi_compile: {message}", stacklevel=2)


def _exchange(fallbacks: tuple[EagerFallback, ...]) -> None:
    """These are installed now. Where the newest that replaces an operator does it by one with the same arguments, it is redirected."""
    global _installed, _switched_for
    _installed = fallbacks
    if fallbacks and fallbacks != _switched_for:
        for (op, device), which in _switches.items():
            found = _replacement(fallbacks, op, device)
            calls.switch(which, found is not None and id(found[0]) in _THEIR_ENTRIES)
        _switched_for = fallbacks
    calls.switch_all(bool(fallbacks))


def _decide_here() -> None:
    """A redirection does not hold for a thread with fallbacks of its own, nor within a product's replacement, to which it is the native one."""
    calls.own(bool(_active.fallbacks) or not _active.operators.isdisjoint(_REDIRECTED))


def exact(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator of `REFUSED` comes out the same in every order: of integers, or where it is told not to add up."""
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if not any(x.is_floating_point() or x.is_complex() for x in leaves):
        return True
    names = [a.name for a in op._schema.arguments]
    if "accumulate" not in names:
        return False
    i = names.index("accumulate")
    return not (args[i] if len(args) > i else kwargs.get("accumulate", False))


def _has_kernel(op: OpOverload, key: str) -> bool:
    """Not so a composite of PyTorch's that autograd sees through: it calls others, which are in the table themselves.

    What other libraries register without a dispatch key looks like one, and calls none (vLLM's C++ for CPUs).
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = [key, "CompositeExplicitAutograd"] + ["CompositeImplicitAutograd"] * (op.namespace != "aten")
    return torch._C._dispatch_has_kernel(op.name()) and any(has(op.name(), k) for k in keys)


def _with_siblings(name: str) -> Iterator[OpOverload]:
    """Every overload of a packet `ns::packet` and of its in-place form; none where nobody registered it."""
    ns, packet = name.split("::")
    for sibling in (packet, packet + "_"):
        found = getattr(getattr(torch.ops, ns), sibling, None)
        if found is not None:
            yield from (getattr(found, overload) for overload in found.overloads())


@functools.cache
def _of_its_own(key: str) -> frozenset[OpOverload]:
    """ATen's operators that PyTorch composes of others, and that have a kernel under `key`, or its autograd's key, all the same."""
    has, found = torch._C._dispatch_has_kernel_for_dispatch_key, set()
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has(name, "CompositeImplicitAutograd"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            if has(name, key) or has(name, f"Autograd{key}"):
                found.add(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    return frozenset(found)


def _put_in(op: OpOverload, device: str, autograd: bool = False, sparse: str = "") -> None:
    """Give `op` our kernel on `device`, or under its autograd's key, or under the key `sparse`, if it does not have one there yet."""
    global _switched_for
    key = sparse or f"{'Autograd' * autograd}{KERNELS[device][0]}"
    if (op, key) in _kernels or (autograd and not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)):
        return
    original = torch.library.get_kernel(op, key)
    native = calls.native(op, key) if key == "CPU" and op in _WHOLE else None
    _register(op, key, (_sparse_kernel if sparse else _autograd_kernel if autograd else _kernel)(op, device, original))
    if autograd or sparse or (op not in _SAME_ARGUMENTS and native is None):
        return
    with _overriding():
        which = calls.redirect(op, key, _SAME_ARGUMENTS[op]) if native is None else calls.whole(op, key, native)
    if which is not None:
        _switches[op, device] = which
        _switched_for = ()


def _put_in_linear() -> None:
    """The same for linear, under the key of operators that PyTorch composes of others: on every device without one of its own."""
    key = "CompositeImplicitAutograd"
    if (_LINEAR, key) not in _kernels:
        with _overriding(), calls.linear():
            # get_kernel takes a device's key, and finds the composed kernel by it
            _register(_LINEAR, key, _linear_kernel(torch.library.get_kernel(_LINEAR, "CPU")))


def _register(op: OpOverload, key: str, kernel: Callable[..., Any]) -> None:
    if op.namespace not in _libraries:
        _libraries[op.namespace] = torch.library.Library(op.namespace, "IMPL")
    with _overriding():
        name = op.name().partition("::")[2]
        _libraries[op.namespace].impl(name, kernel, key, with_keyset=True, allow_override=True)
    _kernels.add((op, key))


@contextlib.contextmanager
def _overriding() -> Iterator[None]:
    """PyTorch warns of what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        yield


def _kernel(op: OpOverload, device: str, original: Any) -> Callable[..., Any]:
    as_tensors, me = _numbers_as_tensors(op), id(op)
    redirected = me in _REDIRECTED

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        mine = _active.fallbacks
        fallbacks = _installed + mine if mine else _installed
        if fallbacks:
            inside = _active.operators
            # a replacement that calls its own operator means the native one
            found = _replacement(fallbacks, op, device) if me not in inside else None
            if found is not None and not found[0].stays(*args, **kwargs):
                inside.add(me)
                if redirected:
                    _decide_here()
                try:
                    return found[1](*args, **kwargs)
                finally:
                    inside.discard(me)
                    if redirected:
                        _decide_here()
            if found is None and me not in inside and any(f.device == device and op in f.apart for f in fallbacks):
                return op.decompose(*args, **kwargs)
            if found is None and not inside:
                for fallback in fallbacks:
                    if fallback.device == device and op in fallback.refused:
                        fallback.refuse(op, (args, kwargs), fallback.refused[op])
        return original.call_boxed(keyset, *as_tensors(args), **kwargs)

    return run


_LINEAR, _ADDMM = torch.ops.aten.linear.default, torch.ops.aten.addmm.default


def _linear_kernel(original: Any) -> Callable[..., Any]:
    """linear with a bias as one addmm, however its input lies in memory.

    PyTorch takes addmm, which rounds once, where an input of three or more dimensions is contiguous, and a product and a sum, which
    round twice, where it is not; a transposed batch of one is contiguous (nn.MultiheadAttention and nn.GRU with batch_first).
    """

    def run(keyset: torch._C.DispatchKeySet, input: Any, weight: Any, bias: Any = None) -> Any:
        if bias is not None and input.dim() > 2 and weight.dim() == 2 and bias.dim() == 1:
            fallbacks = _installed + _active.fallbacks
            if _active.tracing or _replacement(fallbacks, _ADDMM, input.device.type) is not None:
                return torch.addmm(bias, input.flatten(0, -2), weight.t()).unflatten(0, input.shape[:-1])
        return original.call_boxed(keyset, input, weight, bias)

    return run


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """While this thread traces a graph that the passes will rewrite: linear as above."""
    with _lock:
        _put_in_linear()
    before, _active.tracing = _active.tracing, True
    try:
        yield
    finally:
        _active.tracing = before


def _sparse_kernel(op: OpOverload, device: str, original: Any) -> Callable[..., Any]:
    as_tensors = _numbers_as_tensors(op)

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        for fallback in _installed + _active.fallbacks:
            if fallback.device == device and op in fallback.refused_sparse and not _active.operators:
                fallback.refuse(op, (args, kwargs), fallback.refused_sparse[op])
        return original.call_boxed(keyset, *as_tensors(args), **kwargs)

    return run


def _autograd_kernel(op: OpOverload, device: str, original: Any) -> Callable[..., Any]:
    """For an operator that the device's library differentiates by itself: on the way to its kernel, past the table."""
    as_tensors = _numbers_as_tensors(op)

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        mine = _active.fallbacks
        fallbacks = _installed + mine if mine else _installed
        if any(f.device == device and op in f.apart for f in fallbacks):
            if _replacement(fallbacks, op, device) is None:
                return op.decompose(*args, **kwargs)
            if not (torch.is_grad_enabled() and any(_wants_gradient(x) for x in (*args, *kwargs.values()))):
                with torch._C._AutoDispatchBelowAutograd():
                    return op(*args, **kwargs)
        return original.call_boxed(keyset, *as_tensors(args), **kwargs)

    return run


def _wants_gradient(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _replacement(fallbacks: tuple[EagerFallback, ...], op: Any, device: str) -> tuple[Entry, Replacement] | None:
    """That of the newest fallback which has one."""
    for fallback in reversed(fallbacks):
        if fallback.device == device and id(op) in fallback.by_id:
            return fallback.by_id[id(op)]
    return None


def _numbers_as_tensors(op: OpOverload) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """PyTorch hands a number that stands for a tensor to a Python kernel as the number, but takes only a tensor back."""
    places = [i for i, a in enumerate(op._schema.arguments) if isinstance(a.type, torch.TensorType)]

    def arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
        numbers = [i for i in places if i < len(args) and isinstance(args[i], (int, float, complex))]
        if not numbers:
            return args
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        return tuple(_as_tensor(x, tensors) if i in numbers else x for i, x in enumerate(args))

    return arguments


def _as_tensor(number: Any, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The number beside `tensors` as precisely as PyTorch takes it, and without a say in the dtype of the result."""
    kinds = tuple((x.dtype, x.dim() > 0) for x in tensors)
    # a zero has a sign, which equality does not see
    return _number_tensor(number, kinds) if number == 0 or isinstance(number, complex) else _constant(number, kinds)


@functools.lru_cache(maxsize=4096, typed=True)  # asked at every call of eager code with a number
def _constant(number: float, tensors: tuple[tuple[torch.dtype, bool], ...]) -> torch.Tensor:
    with torch.inference_mode(False):  # it outlives the mode that asks first
        return _number_tensor(number, tensors)


def _number_tensor(number: Any, tensors: tuple[tuple[torch.dtype, bool], ...]) -> torch.Tensor:
    if not tensors:
        return torch.scalar_tensor(number, dtype=torch.tensor(number).dtype, device="cpu")
    likes = [torch.empty([0] * has_dims, dtype=dtype, device="meta") for dtype, has_dims in tensors]
    dtype = functools.reduce(torch.promote_types, (torch.result_type(x, number) for x in likes))
    if dtype in (torch.float16, torch.bfloat16) and any(has_dims for _, has_dims in tensors):
        dtype = torch.float32  # the kernel computes in it, and rounds once
    return torch.scalar_tensor(number, dtype=dtype, device="cpu")


def replaced_by(op: Any, device: str) -> Entry | None:
    """The entry of the table by which an installed fallback replaces `op` on `device` now."""
    found = _replacement(_installed + _active.fallbacks, op, device)
    return None if found is None else found[0]


def install(options: Options | None = None, device: str = "cpu") -> EagerFallback:
    """Replace the table's operators for every tensor on `device` in this process, until `.remove()`.

    Several may be installed at once: an operator is replaced as long as one of them replaces it, by the newest. What is
    left of the last removed is a call of a Python function at each of those operators (some microseconds), which hands on
    to PyTorch's kernel.

    Raises:
        OptionError, TableError, RuntimeError: as `resolve`, `Table` and `load_kernels` do; then nothing is installed.
    """
    fallback = prepare(options or Options(), device)
    with _lock:
        _exchange((*_installed, fallback))
    return fallback


def prepare(options: Options, device: str) -> EagerFallback:
    """A fallback whose kernels are in their place, and which is not installed. Raises as `install` does."""
    fallback = EagerFallback(options, device)
    with _lock:
        load_kernels(device)
        _put_in_linear()
        for op in (*fallback.replaced, *fallback.refused, *fallback.apart):
            if _has_kernel(op, KERNELS[device][0]):
                _put_in(op, device)
        for op in fallback.apart:
            _put_in(op, device, autograd=True)
        for op in fallback.refused_sparse:
            for key in SPARSE_KEYS.get(device, ()):
                if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
                    _put_in(op, device, False, key)
    return fallback


@contextlib.contextmanager
def held(*fallbacks: EagerFallback) -> Iterator[None]:
    """Install prepared fallbacks for this thread alone, and those that it may `hold` within the block."""
    before = _active.fallbacks
    _hold((*before, *fallbacks))
    try:
        yield
    finally:
        _hold(before)


def hold(fallback: EagerFallback) -> None:
    """One more for the `held` that this thread is in."""
    _hold((*_active.fallbacks, fallback))


def _hold(fallbacks: tuple[EagerFallback, ...]) -> None:
    _active.fallbacks = fallbacks
    _decide_here()
