"""What torch.compile leaves uncompiled runs under the eager fallback, and is judged.

Dynamo runs plain Python wherever it does not compile: around a graph break, in a hook, where a stance or a setting says so.
Beyond its recompile limit it would run some batches so and others compiled, and fused code rounds differently: that is an error. A `Scope` is entered with each call of a compiled program. Until the call returns, every operator that this
thread calls outside of our graphs is judged (`eager_audit`), and replaced if the table replaces it, for this thread only. In
a graph nothing of this is there (`eager_audit.away`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import warnings
from collections.abc import Iterator

from torch._dynamo import config, eval_frame

from . import eager, eager_audit
from .audit.spec import ALLOWED, Call, Verdict
from .errors import HostError
from .options import Options
from .targets import get_target

#: sets what makes the recompile limit an error, and gives a function that takes it back
_FAIL = config._make_closure_patcher(fail_on_recompile_limit_hit=True)


class Uncompiled(eager_audit.Observer):
    """Judges what runs outside of graphs; makes the fallback for a device when something there needs it."""

    def __init__(self, options: Options) -> None:
        device = "cpu" if options.target is None else get_target(options.target).device
        super().__init__(dataclasses.replace(options, batch=None, probe=None), device)
        self.given = options
        self.fallbacks: dict[str, eager.EagerFallback] = {}

    def belongs_to_a_graph(self) -> bool:
        return False  # in ours it is not there; another compiler's are as good as eager code

    def judge(self, call: Call) -> tuple[Verdict, str]:
        found = super().judge(call)
        device = self.device_of(call)
        if found[0] in ALLOWED or device in self.fallbacks:
            return found
        self.fallbacks[device] = eager.prepare(self.options, device)
        eager.hold(self.fallbacks[device])
        return super().judge(call)


class Scope:
    """The calls of one compiled program."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._thread = threading.local()  # a mode holds state of its own

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """One call.

        Raises:
            HostError: a setting with which torch.compile would run as it is what we refuse.
            AuditError: an operator that is not known to be invariant is called outside of a graph.
        """
        check_host()
        current = eager_audit.current()
        if isinstance(current, Uncompiled) and current.given == self.options:
            yield
            return
        if not hasattr(self._thread, "observer"):
            self._thread.observer = Uncompiled(self.options)
        observer = self._thread.observer
        undo = _FAIL()
        try:
            with eager_audit.watching(observer), eager.held(*observer.fallbacks.values()):
                yield
        finally:
            undo()


def check_host() -> None:
    """Raises HostError: a setting with which torch.compile would run as it is what we refuse."""
    stance = eval_frame._stance
    if config.suppress_errors:
        raise HostError(
            "torch._dynamo.config.suppress_errors would silently run a graph that bi_ascend refused: set it to False"
        )
    if stance.stance not in ("default", "force_eager", "fail_on_recompile"):
        raise HostError(
            f"torch.compiler.set_stance({stance.stance!r}) runs some batches compiled and others not, and fused code rounds differently: "
            'use "default", "force_eager" or "fail_on_recompile"'
        )
    if stance.backend is not None:
        raise HostError(
            f"torch.compiler.set_stance(force_backend={stance.backend!r}) compiles with another backend than bi_ascend, "
            "so nothing would be replaced: remove force_backend"
        )


def switched_off() -> str | None:
    """The setting by which nothing at all is compiled in this process; None where there is none."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1"
    if config.disable:
        return "TORCH_COMPILE_DISABLE=1 or torch._dynamo.config.disable"
    return None


def say_if_switched_off() -> None:
    setting = switched_off()
    if setting:
        warnings.warn(
            f"bi_compile: {setting} is set, so nothing is compiled: the program runs operator by operator, under the eager fallback",
            stacklevel=4,
        )


def in_scope() -> bool:
    """Whether this thread is in a call of a compiled program."""
    return any(isinstance(o, Uncompiled) for o in eager_audit.observers())
