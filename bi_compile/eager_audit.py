"""What runs without a graph is judged by the rules of the audit: operators at the dispatcher, Triton kernels at their launch.

    with eager_audit.judged(options, "cuda") as seen:
        ...                     # a warm-up: every operator that this thread calls outside of compiled graphs
    seen.report(), seen.calls

A `TorchDispatchMode` sees each call below autograd: in eager code, between compiled graphs, in custom operators' place. It does
not see what runs inside an operator (its C++ kernel, the replacement of the eager fallback), inside a compiled graph (which
has an audit of its own), in another thread, or in a backward pass.

The operators are judged one by one. Which dimension carries the rows is not followed here: an operator that mixes rows by
its meaning, such as a mean over the batch, is found in graphs only.

After the with-block nothing is left that costs anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import threading
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode, _push_mode

from . import eager
from .audit.report import Finding, Report
from .audit.spec import ALLOWED, Call, Knowledge, Verdict, judge
from .errors import AuditError, OptionError
from .options import Options, for_a_program
from .passes import PASSES
from .refused import REFUSED
from .resolve import resolve
from .table import Table
from .targets import for_device
from .user_code import place, triton_files

log = logging.getLogger("bi_compile")

#: the operator as which Inductor may call a whole compiled graph, and the function in which it calls one
_COMPILED_GRAPH = "inductor_compiled_code"
_COMPILED_CALL = (os.path.join("_inductor", "output_code.py"), "__call__")


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        """Those that watch this thread, the innermost last."""
        self.depth = 0
        """How many operators or compiled graphs this thread is inside of."""


_thread = _PerThread()


class Observed:
    """The operators and Triton kernels that were seen, with verdicts."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.calls: Counter[str] = Counter()
        """Operator (`ns.packet.overload`) or kernel (`triton.NAME`) -> how often it was called."""
        self._findings: dict[tuple[str, Verdict, str], Finding] = {}

    def add(self, finding: Finding) -> None:
        self._findings[finding.operator, finding.verdict, finding.reason] = finding

    def has(self, operator: str, verdict: Verdict, reason: str) -> bool:
        return (operator, verdict, reason) in self._findings

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One for each operator and verdict, with the place of its first call."""
        return tuple(self._findings.values())

    @property
    def objections(self) -> tuple[Finding, ...]:
        """What is not known to be batch-invariant."""
        return tuple(f for f in self.findings if f.verdict not in ALLOWED)

    def report(self) -> Report:
        """The findings as the audit of a graph gives them."""
        return Report(self.target, self.findings)


class Observer(TorchDispatchMode):
    """Judges every operator that is called under it, and raises or warns as `options.on_unproven` says."""

    supports_higher_order_operators = True

    def __init__(self, options: Options, device: str, seen: Observed | None = None) -> None:
        super().__init__()
        if options.batch is not None or options.probe is not None:
            name = "probe" if options.batch is None else "batch"
            raise OptionError(
                f"the option {name} is about a graph, and there is none here: leave it out for eager code"
            )
        self.options = options
        self.passes = resolve(options).passes
        self.device = device
        self.seen = seen or Observed(for_device(device, compiled=False).name)
        self._warned: set[str] = set()
        self._settled: dict[Any, str] = {}
        """Operators that are allowed whatever their arguments and device are -> their names."""
        self.knowledge = functools.cache(self._knowledge)
        self.knowledge(device)

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # otherwise torch.compile runs everything under it uncompiled

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def _knowledge(self, device: str) -> Knowledge:
        target = for_device(device, compiled=False)
        return Knowledge(target, Table(self.passes, target.name), Table(PASSES, target.name), self.options.trust)

    def belongs_to_a_graph(self) -> bool:
        """Whether the call comes from a compiled graph, which has an audit of its own."""
        return _in_a_compiled_graph()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _thread.depth or _in_backward() or _compiling() or _is_compiled_graph(func) or self.belongs_to_a_graph():
            return _inside(func, args, kwargs)
        if func in self._settled:
            self.seen.calls[self._settled[func]] += 1
            return _inside(func, args, kwargs)
        if _is_fake(args, kwargs):
            return _inside(func, args, kwargs)
        call = _call(func, args, kwargs)
        verdict, reason = self.judge(call)
        if verdict not in ALLOWED and _is_composite(func):
            with self:  # under inference_mode it arrives whole; its parts are what runs
                return func.decompose(*args, **kwargs)
        self.note(call.name, verdict, reason)
        if verdict is Verdict.ROW_LOCAL and self.always_row_local(func):
            self._settled[func] = call.name
        return _inside(func, args, kwargs)

    def always_row_local(self, func: Any) -> bool:
        """Whatever its arguments are, and on the CPU too."""
        if not isinstance(func, OpOverload) or any(a.name == "accumulate" for a in func._schema.arguments):
            return False
        call = Call(func, (), {}, complete=False)
        cpu = self.knowledge("cpu")
        return judge(call, cpu)[0] is self.judge(call)[0] is Verdict.ROW_LOCAL

    def judge(self, call: Call) -> tuple[Verdict, str]:
        device = self.device_of(call)
        entry = eager.replaced_by(eager.CALLS.get(str(call.target), call.target), device)
        if entry is not None:
            if not call.complete:
                return Verdict.VARIANT, entry.why
            if entry.stays(*call.args, **call.kwargs):
                return Verdict.ROW_LOCAL, "exact for these arguments in every order"
            return Verdict.REPLACED, f"by the pass {entry.pass_name!r} at the dispatcher"
        known = self.knowledge(device)
        found = judge(call, known)
        if found[0] is not Verdict.UNPROVEN or not isinstance(call.target, OpOverload):
            return found
        for functional in _functional(call.target):
            found = judge(dataclasses.replace(call, target=functional), known)
        for packet in (call.target._schema.name, call.target._schema.name.removesuffix("_")):
            if packet in REFUSED and call.complete:
                if eager.exact(call.target, call.args, dict(call.kwargs)):
                    return Verdict.ROW_LOCAL, "exact for these arguments in every order"
                return Verdict.VARIANT, f"{REFUSED[packet]}; {found[1]}"
        return found

    def device_of(self, call: Call) -> str:
        """Where it runs: on an accelerator if one of its tensors lies there."""
        found = {x.device.type for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, torch.Tensor)}
        if call.kwargs.get("device") is not None:
            found.add(torch.device(call.kwargs["device"]).type)
        return next(
            (d for d in sorted(found) if d in _devices() and d != "cpu"), "cpu" if "cpu" in found else self.device
        )

    def note(self, operator: str, verdict: Verdict, reason: str) -> None:
        """Count it, and raise or warn if it is not allowed."""
        self.seen.calls[operator] += 1
        new = not self.seen.has(operator, verdict, reason)
        if new:
            self.seen.add(Finding("eager", operator, verdict, reason, place()))
        if verdict in ALLOWED or (not new and self.options.on_unproven == "warn"):
            return
        message = f"{operator} {verdict.value}: {reason} — {place()}"
        if self.options.on_unproven == "error":
            raise AuditError(f"eager code is not known to be batch-invariant: {message}")
        if operator not in self._warned:
            self._warned.add(operator)
            log.warning("bi_compile: not batch-invariant: %s", message)
            warnings.warn(f"bi_compile: not batch-invariant: {message}", stacklevel=2)

    def launched(self, kernel: str) -> None:
        """A Triton kernel is about to run that belongs to no operator."""
        name = f"triton.{kernel}"
        self.note(name, *judge(Call(name, (), {}), self.knowledge(self.device)))


def _inside(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call within which nothing is judged: it belongs to an operator that was."""
    _thread.depth += 1
    try:
        return func(*args, **kwargs)
    finally:
        _thread.depth -= 1


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """What runs in this thread within the block is not judged: it belongs to an operator or a graph that was."""
    _thread.depth += 1
    try:
        yield
    finally:
        _thread.depth -= 1


def observers() -> tuple[Observer, ...]:
    """Those that watch this thread, the innermost last."""
    return _thread.observers


def current() -> Observer | None:
    """The innermost that watches this thread."""
    return _thread.observers[-1] if _thread.observers else None


def away(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph that has an audit of its own: no one watches within, and no operator costs more."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        observer = current()
        if observer is None or _thread.depth:
            return function(*args, **kwargs)
        if _get_current_dispatch_mode() is not observer:  # a mode of the user's lies above
            return _inside(function, args, kwargs)
        _pop_mode()
        _count_hook(-1)
        try:
            return _inside(function, args, kwargs)
        finally:
            _count_hook(1)
            _push_mode(observer)

    return run


@contextlib.contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """`observer` judges what this thread calls within the block."""
    before = _thread.observers
    _thread.observers = (*before, observer)
    _count_hook(1)
    try:
        with observer:
            yield
    finally:
        _count_hook(-1)
        _thread.observers = before


def judge_within(observer: Observer, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(...)`, judged by `observer` although an operator or a compiled graph calls it.

    For an operator that holds a part of the host's model: what it runs is judged, not the operator as a whole.
    """
    before, _thread.depth = _thread.depth, 0
    try:
        with watching(observer):
            return function(*args, **kwargs)
    finally:
        _thread.depth = before


@contextlib.contextmanager
def judged(options: Options | None = None, device: str = "cpu", seen: Observed | None = None) -> Iterator[Observed]:
    """Judge what this thread runs outside of compiled graphs within the block.

    An operator that an installed fallback replaces (`eager.install`) counts as replaced. With on_unproven="error" the call of
    an operator that is not known to be invariant raises, before it runs; with "warn" it is said once for each operator.

    Args:
        device: where a call without tensors and a Triton kernel is taken to run: "cpu", "cuda" or "npu".
        seen: what an earlier block saw; this one adds to it, and says nothing twice.

    Raises:
        OptionError, TableError: as `resolve` and `Table` do, or an option that speaks of a graph.
        AuditError: an operator that is not known to be invariant; the message names it, the place of its call and the remedy.
    """
    observer = Observer(options or Options(), device, seen)
    with watching(observer):
        yield observer.seen


@contextlib.contextmanager
def invariant(
    options: Options | None = None, device: str = "cpu", audit: bool = False
) -> Iterator[eager.EagerFallback]:
    """`eager.install` for the length of a with-block.

    Args:
        audit: judge every operator that this thread calls in the block (`judged`); `.seen` holds what it saw.

    Raises:
        AuditError: an operator of `refused.REFUSED` is called; with `audit`, any that is not known to be invariant.
    """
    fallback = eager.install(None if options is None else for_a_program(options), device)
    try:
        if not audit:
            yield fallback
            return
        with judged(options, device) as fallback.seen:
            yield fallback
    finally:
        fallback.remove()


@functools.cache
def _devices() -> tuple[str, ...]:
    from .ops import KERNELS

    return tuple(KERNELS)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A mutable operator that a compiler made functional, and that no compiler lowered, goes by its own name."""
    if isinstance(func, HigherOrderOperator) and func.name().startswith("auto_functionalized"):
        return Call(args[0], args[1:], kwargs, complete=False)
    return Call(func, args, kwargs)


def _compiling() -> bool:
    """Whether torch.compile is at work: Inductor traces its patterns with real tensors when it is first asked to compile."""
    return torch._guards.CompileContext.current_compile_id() is not None


def _is_fake(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A compiler looks ahead. A rule must not see this: where it compares a symbolic size, the graph is compiled for that size alone."""
    return any(isinstance(x, (FakeTensor, torch.SymInt)) for x in pytree.tree_leaves((args, kwargs)))


def _is_compiled_graph(func: Any) -> bool:
    return isinstance(func, HigherOrderOperator) and func.name() == _COMPILED_GRAPH


def _in_a_compiled_graph() -> bool:
    """Whether Inductor's code calls: a product, say, for which it wrote no kernel."""
    frame: types.FrameType | None = sys._getframe(1)
    file, function = _COMPILED_CALL
    while frame is not None and frame.f_code is not judge_within.__code__:
        if frame.f_code.co_name == function and frame.f_code.co_filename.endswith(file):
            return True
        frame = frame.f_back
    return False


def _functional(op: OpOverload) -> Iterator[OpOverload]:
    """The operator that an in-place form (`op_`) computes; none for another."""
    schema = op._schema
    if schema.name.endswith("_") and schema.is_mutable:
        packet = getattr(getattr(torch.ops, op.namespace), schema.name.partition("::")[2].removesuffix("_"), None)
        types = [a.type for a in schema.arguments]
        for overload in packet.overloads() if packet is not None else ():
            found = getattr(packet, overload)
            if [a.type for a in found._schema.arguments] == types and not found._schema.is_mutable:
                yield found


def _is_composite(func: Any) -> bool:
    return isinstance(func, OpOverload) and func._can_decompose() and not func.name().startswith("bi_compile::")


# -- Triton kernels ---------------------------------------------------------------------------------------------------

_hook_lock = threading.Lock()
_hook_users = 0
#: function of Triton that is wrapped now -> our wrapper, what was there
_wrapped: dict[str, tuple[Any, Any]] = {}


def _on_launch(name: str) -> None:
    observers = _thread.observers
    if not observers or _thread.depth or _in_backward() or observers[-1].belongs_to_a_graph():
        return
    observers[-1].launched(name)


def _count_hook(by: int) -> None:
    """Triton's launches come past `_on_launch` as long as there are users; nothing happens without Triton."""
    global _hook_users
    with _hook_lock:
        before, _hook_users = _hook_users, _hook_users + by
        if bool(before) != bool(_hook_users):
            _set_hook(_hook_users > 0)


def _set_hook(on: bool) -> None:
    """Wrap the two functions by which a program launches a kernel, or give them back.

    Not Triton's own hook: while there is one, Inductor loads its kernels with a launcher that costs the host 90 us more a launch
    (torch/_inductor/runtime/static_triton_launcher.py), for good. Its kernels do not come this way, they belong to a graph.
    """
    if not triton_files():
        return
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    for owner, name, wrap in ((JITFunction, "run", _watched_run), (CompiledKernel, "__getitem__", _watched_getitem)):
        if on:
            theirs = getattr(owner, name)
            _wrapped[name] = wrap(theirs), theirs
            setattr(owner, name, _wrapped[name][0])
        else:
            ours, theirs = _wrapped.pop(name)
            if getattr(owner, name) is ours:  # where somebody has wrapped it since, ours stays below and does nothing
                setattr(owner, name, theirs)


def _watched_run(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):
            _on_launch(self.__name__)
        return theirs(self, *args, **kwargs)

    return run


def _watched_getitem(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def getitem(self: Any, grid: Any) -> Any:
        launch = theirs(self, grid)

        def runner(*args: Any, **kwargs: Any) -> Any:
            _on_launch(self.name)
            return launch(*args, **kwargs)

        return runner

    return getitem
