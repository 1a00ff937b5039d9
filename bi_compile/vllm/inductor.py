"""The pass as vLLM wants it: an `InductorPass`; and in what vLLM compiles beside the model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass

from .. import eager_audit
from ..backend import FinalPass
from ..options import Options
from ..pipeline import Pipeline
from .keys import RANDOM_SAMPLING


class VllmPass(FinalPass, InductorPass):
    """`FinalPass` for vLLM; travels to the worker processes by its options."""

    def __init__(self, options: Options, theirs: Any = None) -> None:
        FinalPass.__init__(self, Pipeline(options), theirs)

    def __call__(self, graph: fx.Graph) -> None:
        FinalPass.__call__(self, graph)

    def uuid(self) -> Any:
        return FinalPass.uuid(self)

    def __reduce__(self) -> Any:
        return type(self), (self.pipeline.options, self.theirs)

    def nested(self, theirs: Any) -> NestedPass:
        """The same for a graph that vLLM compiles beside the model's."""
        return NestedPass(self.pipeline, theirs)

    def __deepcopy__(self, memo: Any) -> VllmPass:
        # vLLM copies its configuration; the copies report to one summary
        return self


class NestedPass(FinalPass):
    """The engine's passes and audit for a graph of vLLM's own, which may draw the random numbers of sampling."""

    extra_trust = RANDOM_SAMPLING


@contextlib.contextmanager
def around_compile_fx(patches: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """What Inductor compiles within has `patches()` in its configuration, asked for at each compilation.

    vLLM compiles small functions by torch.compile, without the model's settings: random sampling, the native form of a custom
    operator.
    """
    from torch._inductor import compile_fx as module
    from torch._inductor import config

    plain = module.compile_fx

    @functools.wraps(plain)
    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        # what the compiler computes to find out about graphs is no part of the engine's work
        with config.patch(patches()), eager_audit.inside():
            return plain(*args, **kwargs)

    module.compile_fx = compile_fx
    try:
        yield
    finally:
        module.compile_fx = plain
