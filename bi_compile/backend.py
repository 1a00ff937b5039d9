"""`torch.compile(model, backend="bi_ascend", options={…})`.

AOTAutograd captures the forward graph in whole operators; the passes rewrite it; the inner compiler gets it. With Inductor
the passes run once more over the graph that Inductor is about to lower, and the audit judges that one. The backward graph
of a training step goes to the inner compiler untouched.
"""

from __future__ import annotations

import functools
import inspect
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo import eval_frame
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._inductor.custom_graph_pass import CustomGraphPass

from . import eager, ops
from .audit.inputs import BatchInput, batch_inputs, input_names, name_inputs, placed
from .eager_audit import away
from .errors import HostError, OptionError
from .options import for_a_program, read_options
from .pipeline import Pipeline, devices_of
from .targets import Target
from .uncompiled import Scope, in_scope, say_if_switched_off
from .user_code import place

Compiled = Callable[..., Any]


class FinalPass(CustomGraphPass):
    """The passes and the audit as Inductor's `post_grad_custom_post_pass`; keyed into its cache by `uuid()`.

    A pass that the user had set there runs between: it gets a graph that the passes have been over, and what it put in is
    replaced after it.
    """

    #: operators that are trusted here beside those of the options
    extra_trust: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        pipeline: Pipeline,
        theirs: Any = None,
        target: Target | None = None,
        batch: Sequence[BatchInput] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.pipeline = pipeline
        self.names = names
        self.theirs = theirs
        self.target = target
        self.batch = batch

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor.decomposition import select_decomp_table

        target = self.target or self.pipeline.target_of(graph)
        name_inputs(graph, self.names)
        if self.theirs is not None:
            # an operator that theirs would lower or fuse is still whole here
            self.pipeline.rewrite(graph, "post_grad", select_decomp_table(), target)
            self.theirs(graph)
        self.pipeline.rewrite(graph, "final", select_decomp_table(), target)
        # Inductor puts constants that the graph holds in front of its inputs
        batch = None if self.batch is None else placed(self.batch, graph)
        self.pipeline.audit(graph, self.extra_trust, target=target, batch=batch)

    def uuid(self) -> Any:
        target = self.target or self.pipeline.resolved.target
        made_for = target.code_for() if target is not None else ""
        ours: Any = f"{self.pipeline.uuid()} {made_for}".rstrip()
        # where the batch is decides the verdict: a graph that was judged with another batch is no answer
        ours = (ours, tuple(self.batch)) if self.batch else ours
        if self.theirs is None:
            return ours
        # a pass without uuid() cannot be part of a key: then Inductor must not cache
        key = self.theirs.uuid() if hasattr(self.theirs, "uuid") else None
        return None if key is None else (key, ours)

    def __getstate__(self) -> Any:
        return {"uuid": self.uuid()}


def bi_ascend(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
    """The backend. `options`: see `bi_compile.options.Options`.

    Raises:
        OptionError, TableError, RewriteError, AuditError: see `bi_compile.errors`.
    """
    options = kwargs.pop("options", None)
    if kwargs:
        raise OptionError(
            f"torch.compile({', '.join(f'{k}={v!r}' for k, v in kwargs.items())}) chooses kernels by measuring them or changes what Inductor "
            "does, which the backend bi_ascend does not support: leave it out"
        )
    if not in_scope():
        raise HostError(
            "the backend bi_ascend was called by another backend, so what runs outside of its graphs cannot be seen: use "
            'bi_compile.compile(model), or torch.compile(model, backend="bi_ascend")'
        )
    return away(compile_graph(Pipeline(for_a_program(read_options(options))), gm, example_inputs))


def compile_graph(pipeline: Pipeline, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    inductor = pipeline.options.inner == "inductor"
    batch = batch_inputs(gm, example_inputs, pipeline.options.batch)
    names = input_names(gm)
    inner, plain = (_inductor, _plain_inductor) if inductor else (_other, lookup_backend(pipeline.options.inner))

    def forward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        target = pipeline.target_of(graph.graph)
        _check_device(target, graph.graph)
        ops.load_kernels(target.device)
        called = name_inputs(graph.graph, names)
        pipeline.rewrite(graph.graph, "captured", target=target)
        graph.recompile()
        return make_boxed_func(inner(graph, inputs, pipeline, target, placed(batch, graph.graph), called))

    def backward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return make_boxed_func(plain(graph, list(inputs)))

    with eager.tracing():
        return aot_autograd(
            fw_compiler=forward, bw_compiler=backward, inference_compiler=forward, keep_inference_input_mutations=True
        )(gm, example_inputs)


def _check_device(target: Target, graph: fx.Graph) -> None:
    found = devices_of(graph)
    if found and target.device not in found:
        raise OptionError(
            f"target={target.name!r} is a target of the device {target.device!r}, and this graph's tensors lie on {', '.join(sorted(found))}: "
            "leave target out, or move the model"
        )


def _inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    pipeline: Pipeline,
    target: Target,
    batch: Sequence[BatchInput],
    names: Sequence[str],
) -> Compiled:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    if config.cpp_wrapper and any(isinstance(i, torch.SymInt) for i in inputs):
        raise HostError(
            "torch._inductor.config.cpp_wrapper=True takes the symbolic sizes that this graph is given for tensors: set it to False, or "
            "compile with dynamic=False"
        )
    compiled: Any = compile_fx(  # of a GraphModule it makes a callable
        gm,
        inputs,
        config_patches={
            **target.inductor,
            # a graph out of a cache is not judged again, so nobody would hear of what it holds
            **({"force_disable_caches": True} if pipeline.options.on_unproven == "warn" else {}),
            "post_grad_custom_post_pass": FinalPass(pipeline, config.post_grad_custom_post_pass, target, batch, names),
        },
    )
    return compiled


def _plain_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs)
    return compiled


def _other(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    pipeline: Pipeline,
    target: Target,
    batch: Sequence[BatchInput],
    names: Sequence[str],
) -> Compiled:
    pipeline.audit(gm.graph, target=target, batch=batch)
    return lookup_backend(pipeline.options.inner)(gm, list(inputs))


# -- around each call -------------------------------------------------------------------------------------------------


def compile(model: Any = None, *, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """`torch.compile(model, backend="bi_ascend", options=options, **kwargs)`.

    What is not compiled in a call (around a graph break, in a hook, all of it where torch.compile is switched off) runs under
    the eager fallback, and is refused if it is not known to be invariant.

    Args:
        model: a module or a function; None: a decorator.
        options: see `bi_compile.options.Options`.
        kwargs: torch.compile's `dynamic`, `fullgraph` and so on.

    Raises:
        OptionError: a malformed option, or a `backend`.
    """
    if "backend" in kwargs:
        raise OptionError(
            f"backend={kwargs['backend']!r}: bi_compile.compile is the backend bi_ascend; what compiles below it is the option inner"
        )
    if model is None:
        return functools.partial(compile, options=options, **kwargs)
    return torch.compile(model, backend="bi_ascend", options=dict(options) if options else None, **kwargs)


def _guard(compiled: Any, scope: Scope) -> Any:
    """What torch.compile gave for a module or a function, with `scope` around each call."""
    if not isinstance(compiled, torch.nn.Module):
        return _around(compiled, scope)
    if not isinstance(compiled, eval_frame.OptimizedModule):  # the module itself, where torch.compile is switched off
        compiled = eval_frame.OptimizedModule(compiled, eval_frame.DisableContext())
    kind = type(compiled)
    # a hook on the compiled module runs in its __call__
    compiled.__class__ = type(kind.__name__, (kind,), {"__call__": _around(kind.__call__, scope)})
    return compiled


def _around(function: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with scope():
            try:
                return function(*args, **kwargs)
            except FailOnRecompileLimitHit as error:
                raise HostError(
                    f"torch.compile's recompile limit is reached{_function(error)}, called at {place()}, beyond which it would run some batches uncompiled, with "
                    "other bits: compile with dynamic=True, or raise torch._dynamo.config.recompile_limit (TORCH_LOGS=recompiles says why)"
                ) from error

    # an outer torch.compile with another backend would otherwise compile what is in it
    run.__dict__.pop("_torchdynamo_inline", None)
    return torch._dynamo.disable(run)


def _function(error: BaseException) -> str:
    """` in NAME (FILE, line N)` of the function that Dynamo was to compile."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_locals.get("code")
        if frame.f_code.co_name == "_compile" and isinstance(code, types.CodeType):
            return f" in {code.co_name} ({code.co_filename}, line {code.co_firstlineno})"
    return ""


def _ours(backend: Any) -> tuple[bool, Mapping[str, Any] | None]:
    """Whether a backend, as torch.compile hands it to Dynamo, is bi_ascend; its options."""
    options = getattr(backend, "kwargs", {}).get("options")
    backend = getattr(backend, "compiler_fn", backend)
    while isinstance(backend, functools.partial):
        options = backend.keywords.get("options", options)
        backend = backend.func
    return backend is bi_ascend or (isinstance(backend, str) and backend == "bi_ascend"), options


def _hold_on_to_torch_compile() -> None:
    """torch.compile imports this module when it looks up the backend, and then calls `torch._dynamo.optimize`."""
    plain = torch._dynamo.optimize
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters

    @functools.wraps(plain)
    def optimize(*args: Any, **kwargs: Any) -> Any:
        ours, options = _ours(kwargs.get("backend", args[0] if args else None))
        if not ours:
            return plain(*args, **kwargs)
        scope = Scope(for_a_program(read_options(options)))
        say_if_switched_off()
        if isolates:  # layers that share their code, each compiled by itself, do not share a recompile limit
            kwargs["isolate_recompiles"] = True
        decorate = plain(*args, **kwargs)
        return lambda model: _guard(decorate(model), scope)

    torch._dynamo.optimize = optimize


_hold_on_to_torch_compile()
