"""The pass as vLLM wants it: an `InductorPass`."""

from __future__ import annotations

from typing import Any

from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass

from ..backend import FinalPass
from ..options import Options
from ..pipeline import Pipeline


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

    def __deepcopy__(self, memo: Any) -> VllmPass:
        # vLLM copies its configuration; the copies report to one summary
        return self
