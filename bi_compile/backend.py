"""`torch.compile(model, backend="bi_ascend", options={…})`.

AOTAutograd captures the forward graph in whole operators; the passes rewrite it; the inner compiler gets it. With Inductor
the passes run once more over the graph that Inductor is about to lower, and the audit judges that one. The backward graph
of a training step goes to the inner compiler untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.custom_graph_pass import CustomGraphPass

from . import ops
from .options import read_options
from .pipeline import Pipeline
from .targets import Target

Compiled = Callable[..., Any]


class FinalPass(CustomGraphPass):
    """The passes and the audit as Inductor's `post_grad_custom_post_pass`; keyed into its cache by `uuid()`.

    A pass that the user had set there runs between: it gets a graph that the passes have been over, and what it put in is
    replaced after it.
    """

    #: operators that are trusted here beside those of the options
    extra_trust: ClassVar[Mapping[str, str]] = {}

    def __init__(self, pipeline: Pipeline, theirs: Any = None, target: Target | None = None) -> None:
        self.pipeline = pipeline
        self.theirs = theirs
        self.target = target

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor.decomposition import select_decomp_table

        target = self.target or self.pipeline.target_of(graph)
        if self.theirs is not None:
            # an operator that theirs would lower or fuse is still whole here
            self.pipeline.rewrite(graph, "post_grad", select_decomp_table(), target)
            self.theirs(graph)
        self.pipeline.rewrite(graph, "final", select_decomp_table(), target)
        self.pipeline.audit(graph, self.extra_trust, target=target)

    def uuid(self) -> Any:
        if self.theirs is None:
            return self.pipeline.uuid()
        # a pass without uuid() cannot be part of a key: then Inductor must not cache
        key = self.theirs.uuid() if hasattr(self.theirs, "uuid") else None
        return None if key is None else (key, self.pipeline.uuid())

    def __getstate__(self) -> Any:
        return {"uuid": self.uuid()}


def bi_ascend(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
    """The backend. `options`: see `bi_compile.options.Options`.

    Raises:
        OptionError, TableError, RewriteError, AuditError: see `bi_compile.errors`.
    """
    pipeline = Pipeline(read_options(kwargs.get("options")))
    return compile_graph(pipeline, gm, example_inputs)


def compile_graph(pipeline: Pipeline, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    inductor = pipeline.options.inner == "inductor"
    inner, plain = (_inductor, _plain_inductor) if inductor else (_other, lookup_backend(pipeline.options.inner))

    def forward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        target = pipeline.target_of(graph.graph)
        ops.load_kernels(target.device)
        pipeline.rewrite(graph.graph, "captured", target=target)
        graph.recompile()
        return make_boxed_func(inner(graph, inputs, pipeline, target))

    def backward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return make_boxed_func(plain(graph, inputs))

    return aot_autograd(fw_compiler=forward, bw_compiler=backward, inference_compiler=forward)(gm, example_inputs)


def _inductor(gm: fx.GraphModule, inputs: Sequence[Any], pipeline: Pipeline, target: Target) -> Compiled:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(
        gm,
        inputs,
        config_patches={
            **target.inductor,
            # a graph out of a cache is not judged again, so nobody would hear of what it holds
            **({"force_disable_caches": True} if pipeline.options.on_unproven == "warn" else {}),
            "post_grad_custom_post_pass": FinalPass(pipeline, config.post_grad_custom_post_pass, target),
        },
    )


def _plain_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs)


def _other(gm: fx.GraphModule, inputs: Sequence[Any], pipeline: Pipeline, target: Target) -> Compiled:
    pipeline.audit(gm.graph, target=target)
    return lookup_backend(pipeline.options.inner)(gm, inputs)
