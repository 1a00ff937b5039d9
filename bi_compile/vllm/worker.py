"""What a worker of an engine with the key holds in its process, from before its model loads until it is gone, and what it judges.

Several engines may live in one process. The eager fallback is installed while a method of its worker runs, and so is what vLLM keeps
once for the process, for the worker that was made last (`in_turn`). Environment variables, and what vLLM calls while it loads a model,
are set as long as any engine with the key lives (`shared`).

What a worker runs outside of compiled graphs is judged by the rules of the audit (`eager_audit`) while the engine warms up, and at
each step whose requests ask for something that none asked for before (`steps`). Other steps cost nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import vllm.ir
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.logger import init_logger
from vllm.platforms import current_platform

from .. import eager, eager_audit
from ..audit.report import Report
from ..errors import HostError
from ..options import Options
from ..pipeline import Pipeline
from . import platforms
from .engine import nested_compilation, options_of
from .inductor import around_compile_fx
from .keys import KEY, PLACES, RANDOM_SAMPLING
from .shared import environment, layers_of_its_own, shared
from .steps import Steps

log = init_logger("vllm.plugins.bi_compile")


class Held:
    """What one worker holds, and what was judged in it; `release()` gives it back."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.options, self.platform = vllm_config, options_of(vllm_config), platforms.current()
        self.steps, self.judging = Steps(), True
        self.seen: eager_audit.Observed | None = None
        self._within: eager_audit.Observer | None = None
        self.platform.prepare(vllm_config)
        with contextlib.ExitStack() as stack:
            self._enter(stack)
            self._undo = stack.pop_all()

    def _enter(self, stack: contextlib.ExitStack) -> None:
        for name, (value, why) in self.platform.environment.items():
            stack.enter_context(_environment(name, value, why))
        if self.options.on_unproven == "warn":
            # a graph out of a cache is not judged again, so nobody would hear of what it holds
            stack.enter_context(_environment("VLLM_DISABLE_COMPILE_CACHE", "1", "no graph may come from a cache"))
            stack.enter_context(shared("caches", _caches_off))
        for switch in self.platform.switches:
            stack.enter_context(shared(switch, switch))
        stack.enter_context(shared("compile_fx", lambda: around_compile_fx(_settings_of_nested_graphs)))
        current_platform.import_kernels()  # vLLM's operators: one that is not registered yet is passed over
        self.fallback = eager.install(_for_eager_code(self.options), self.platform.device)
        self.fallback.remove()  # its kernels are loaded and put in; `in_turn` has it work

    @property
    def pipeline(self) -> Pipeline:
        """That of the engine's pass."""
        found = self.vllm_config.compilation_config.inductor_compile_config[current_platform.pass_key].pipeline
        assert isinstance(found, Pipeline)
        return found

    @contextlib.contextmanager
    def judge(self) -> Iterator[None]:
        """What this thread runs uncompiled in the block is judged.

        Raises:
            AuditError: an operator that is not known to be invariant, on_unproven is "error", and the platform refuses it.
        """
        options = _for_eager_code(self.options)
        if not self.platform.refuses_uncompiled:
            options = dataclasses.replace(options, on_unproven="warn")
        with eager_audit.judged(options, self.platform.device, self.seen) as self.seen:
            yield

    def judge_within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(...)`, which an operator of vLLM's calls; each of its own operators is judged, and refused on any platform.

        Raises:
            AuditError: one that is not known to be invariant, where on_unproven is "error".
        """
        if self._within is None:
            self._within = eager_audit.Observer(_for_eager_code(self.options), self.platform.device, self.seen)
        return eager_audit.judge_within(self._within, function, *args, **kwargs)

    def certify(self) -> None:
        """Write the certificate of what ran uncompiled beside those of the graphs, if there is a `dump_dir`."""
        if self.options.dump_dir is None or self.seen is None:
            return
        folder = Path(self.options.dump_dir) / f"graph_uncompiled_{self.vllm_config.parallel_config.rank:03d}"
        folder.mkdir(exist_ok=True)
        names = [f.operator for f in self.seen.findings]
        nodes = [
            dataclasses.replace(
                f, node=f.operator if not (n := names[:i].count(f.operator)) else f"{f.operator} {n + 1}"
            )
            for i, f in enumerate(self.seen.findings)
        ]
        known = self.pipeline.knowledge(self.seen.target)
        certificate = self.pipeline.certificate(Report(self.seen.target, tuple(nodes)), known)
        (folder / "audit.json").write_text(json.dumps(certificate, indent=1))

    def release(self) -> None:
        self._undo.close()


_held: weakref.WeakKeyDictionary[Any, Held] = weakref.WeakKeyDictionary()
"""WorkerWrapperBase -> what it holds, of the workers that live."""
_turn = threading.RLock()
_last: Callable[[], Any] = lambda: None
"""The worker whose settings vLLM's IR has."""
_running: Held | None = None
"""What the worker holds whose method runs."""


def _environment(name: str, value: str, why: str) -> contextlib.AbstractContextManager[None]:
    return shared(("environment", name), lambda: environment(name, value, why))


def _caches_off() -> contextlib.AbstractContextManager[None]:
    return torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]


def _settings_of_nested_graphs() -> dict[str, Any]:
    return {} if _running is None else nested_compilation(_running.vllm_config)


def _for_eager_code(options: Options) -> Options:
    # a graph's batch dimensions and a probe's measurements of compiled code say nothing here
    return dataclasses.replace(options, batch=None, probe=None, trust={**RANDOM_SAMPLING, **PLACES, **options.trust})


# -- from the start of a worker to its end ----------------------------------------------------------------------------


def prepare(wrapper: Any) -> None:
    """Set what the guarantee needs in a worker process, before the model is loaded; `release` takes it back.

    Raises:
        HostError: this process cannot have it; the message says why.
    """
    release(wrapper)
    _held[wrapper] = held = Held(wrapper.vllm_config)
    # for an engine that nobody shuts down
    weakref.finalize(wrapper, held.release).atexit = False


def release(wrapper: Any) -> None:
    """The worker is gone, or did not come up."""
    held = _held.pop(wrapper, None)
    if held is not None:
        held.release()


@atexit.register  # at the very end, modules that it needs are gone
def _release_all() -> None:
    for wrapper in list(_held):
        release(wrapper)


def beside_others() -> None:
    """An engine without the key starts in this process.

    Raises:
        HostError: an engine with the key lives here, and a variable that it needs was changed since.
    """
    if not _held:
        return
    for name, (value, why) in platforms.current().environment.items():
        if os.environ.get(name) != value:
            raise HostError(
                f"{name}={os.environ.get(name)} is set, and an engine with {KEY} lives in this process, which needs {value!r} "
                f"({why}): start this one in a process of its own"
            )
    log.warning(
        "bi_compile: an engine with %s lives in this process: this one loads its model and attends with the same settings. Its values "
        "stay right, but its speed and bits may be others than in a process of its own",
        KEY,
    )


def in_turn(plain: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a worker with its own settings, while no other worker of this process runs."""
    global _last, _running
    with _turn:
        if _last() is not wrapper:
            config = vars(wrapper).get("vllm_config")
            if config is not None:  # not so before the worker is made, which sets them
                config.kernel_config.ir_op_priority.set_default()
                vllm.ir.set_default_torch_wrap(config.compilation_config.ir_enable_torch_wrap)
            _last = weakref.ref(wrapper)
        held = _held.get(wrapper)
        if held is _running:  # one of the worker's methods calls another, or there is nothing to do
            return plain(*args, **kwargs)
        before, _running = _running, held
        try:
            with held.fallback.installed() if held is not None else contextlib.nullcontext():
                return plain(*args, **kwargs)
        finally:
            _running = before


def load_model(plain: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Load the worker's model."""
    held = _held.get(wrapper)
    if held is None:
        return in_turn(plain, wrapper, *args, **kwargs)
    with layers_of_its_own():
        if held.options.tp_invariant is None:
            return in_turn(plain, wrapper, *args, **kwargs)
        from . import ranks

        with ranks.experts_in_segments(held.options.tp_invariant):
            result = in_turn(plain, wrapper, *args, **kwargs)
        ranks.put_in(wrapper.worker.get_model(), held.options.tp_invariant)
        return result


# -- what is judged ---------------------------------------------------------------------------------------------------


def warm_up(plain: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """A profile run, dummy runs, the capture of graphs: all is judged."""
    held = _held.get(wrapper)
    if held is None:
        return in_turn(plain, wrapper, *args, **kwargs)
    with held.judge():
        return in_turn(plain, wrapper, *args, **kwargs)


def execute_model(plain: Callable[..., Any], wrapper: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    """A step; judged if it may run what none before ran."""
    held = _held.get(wrapper)
    if held is None:
        return in_turn(plain, wrapper, scheduled, *args, **kwargs)
    held.judging = held.steps.is_new(scheduled)
    return _maybe_judged(held, plain, wrapper, scheduled, *args, **kwargs)


def sample_tokens(plain: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """The second half of a step."""
    held = _held.get(wrapper)
    if held is None:
        return in_turn(plain, wrapper, *args, **kwargs)
    return _maybe_judged(held, plain, wrapper, *args, **kwargs)


def _maybe_judged(held: Held, plain: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    if not held.judging:
        return in_turn(plain, wrapper, *args, **kwargs)
    with held.judge():
        result = in_turn(plain, wrapper, *args, **kwargs)
    held.certify()
    return result


def judge_within(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(...)`, which an operator of vLLM's calls: judged where what this thread runs is judged."""
    if _running is None or eager_audit.current() is None:
        return function(*args, **kwargs)
    return _running.judge_within(function, *args, **kwargs)


def check_model(wrapper: Any) -> None:
    """What can only be checked once a worker's model is there.

    Raises:
        HostError: what is wrong, and what to write instead.
    """
    platforms.current().check_model(wrapper.vllm_config)


def report(wrapper: Any) -> None:
    """One log line for the engine, which has warmed up.

    Raises:
        HostError: nothing was judged, so nothing is known about this engine.
        AuditError: see `Held.judge`.
    """
    held = _held[wrapper]
    cached = _compiled_modules(wrapper)
    assert held.seen is not None
    if not held.seen.calls:
        # without a compiler some workers warm nothing up
        with held.judge():
            in_turn(wrapper.worker.execute_dummy_batch, wrapper)
    held.certify()
    summary, seen = held.pipeline.summary, held.seen
    if summary.graphs:
        compiled = summary.line()
    elif cached:
        compiled = f"{cached} compiled modules from the cache of an earlier start with the same passes and settings, which judged them"
    elif seen.calls:
        compiled = "no graph was compiled here"
    else:
        raise HostError(
            "nothing was compiled in this engine, nothing came from a cache and nothing ran while it warmed up, so nothing could be "
            f"judged: remove {KEY}, or start it so that it warms up"
        )
    left = [f.operator for f in seen.objections]
    say = log.warning if summary.left or left else log.info
    say(
        "bi_compile: %s; %d operators judged uncompiled in %d calls, left %s; %d operators replaced in eager code%s",
        compiled, len(seen.calls), seen.calls.total(), ", ".join(left) or "none", len(held.fallback.operators),
        "".join(f"; {name} {found}" for name, found in held.pipeline.knowledge(seen.target).target.native().items()),
    )  # fmt: skip


def _compiled_modules(wrapper: Any) -> int:
    """How many modules of the worker's model vLLM runs as compiled graphs."""
    return sum(
        (isinstance(m, TorchCompileWithNoGuardsWrapper) and not m.do_not_compile) or m._compiled_call_impl is not None
        for m in wrapper.worker.get_model().modules()
    )
