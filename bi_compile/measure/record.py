"""What a run computed, call by call: eager code through the dispatcher, a compiled graph node by node.

A compiled graph is interpreted instead of compiled (`interpreting`): it is the one that Inductor would lower, after the passes
and the audit. Code that the compiler would generate for several nodes at once is so seen as its nodes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..audit.report import operator_name
from ..rewrite.fx_utils import source_line

#: memory without content, and what only looks at memory: nothing is computed
_NO_CONTENT = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "getitem")
_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


@dataclasses.dataclass
class Call:
    """One operator that ran."""

    operator: str
    layer: str
    """The module that called it, as far as that is known."""
    where: str
    """File and line of the program."""
    arguments: str
    outputs: list[Tensor]
    """Copies of what it returned, then of what it wrote into its arguments."""


class Recorder(TorchDispatchMode):
    """Records every call while it is entered; `calls` holds them in order.

    names: modules by their name, for `Call.layer`.
    only_modules: leave out what is called outside of any module's forward.
    """

    def __init__(self, names: dict[int, str] | None = None, only_modules: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.names = names or {}
        self.only_modules = only_modules

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(func, OpOverload) or not func.is_view:
            where, layer = _caller(self.names)
            if layer or not self.only_modules:
                self.add(func, str(func), layer, where, (args, kwargs), [result, *_written(func, args, kwargs)])
        return result

    def add(self, target: Any, name: str, layer: str, where: str, arguments: Any, results: Any) -> None:
        outputs = [x.detach().clone() for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        packet = target._overloadpacket.__name__ if isinstance(target, OpOverload) else getattr(target, "__name__", "")
        if outputs and packet not in _NO_CONTENT:
            shown = ", ".join(_shape(x) for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor))
            self.calls.append(Call(name, layer, where, shown, outputs))


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that `func` writes into and does not return."""
    if not isinstance(func, OpOverload) or func._schema.returns:
        return []
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    return [given[a.name] for a in func._schema.arguments if a.is_write and a.name in given]


def _caller(names: dict[int, str]) -> tuple[str, str]:
    """The line that called an operator, and the module in whose method that is."""
    frame = sys._getframe(2)
    where = layer = ""
    while frame is not None and not (where and layer):
        file = frame.f_code.co_filename
        if not where and not file.startswith((_TORCH, _OURS, "<")):
            where = f"{file}, line {frame.f_lineno}, in {frame.f_code.co_name}"
        module = frame.f_locals.get("self") if not layer else None
        if isinstance(module, torch.nn.Module):
            layer = names.get(id(module), type(module).__name__)
        frame = frame.f_back  # type: ignore[assignment]
    return where, layer


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0] if stack else ""
    return str(path).replace("L['self'].", "").replace("L['fn'].", "")


class Recorded(fx.Interpreter):
    """Runs a graph and hands every node's value to `recorder`."""

    def __init__(self, graph: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(graph)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        view = isinstance(n.target, OpOverload) and n.target.is_view
        if n.op == "call_function" and not view:
            arguments = self.fetch_args_kwargs_from_env(n)
            self.recorder.add(n.target, operator_name(n), _module_of(n), source_line(n), arguments, result)
        return result


class _Keep:
    """Inductor's last pass: runs the one that is there, then keeps a copy of the graph and ends the compilation."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs
        self.graph: fx.GraphModule | None = None

    def __call__(self, graph: fx.Graph) -> None:
        if self.theirs is not None:
            self.theirs(graph)
        self.graph = fx.GraphModule(graph.owning_module or {}, copy.deepcopy(graph))
        raise _Kept

    def uuid(self) -> None:
        return None


class _Kept(BaseException):
    """The graph is known; no code is generated for it. No Exception, which Inductor would wrap."""


def _recording(current: Callable[[], Recorder | None]) -> Callable[..., Any]:
    """An `inner_compile` for Inductor that interprets the graph; under a recorder, node by node into it."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        keep = _Keep(config.post_grad_custom_post_pass)
        with config.patch(post_grad_custom_post_pass=keep, fx_graph_cache=False), contextlib.suppress(_Kept):
            compile_fx_inner(gm, example_inputs, **kwargs)
        assert keep.graph is not None, "Inductor called no post_grad_custom_post_pass"
        graph = keep.graph

        def run(inputs: list[Any]) -> Any:
            recorder = current()
            given = list(inputs)
            inputs.clear()
            with _disable_current_modes():
                runner = fx.Interpreter(graph) if recorder is None else Recorded(graph, recorder)
                return runner.run(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return inner_compile


@contextlib.contextmanager
def interpreting(current: Callable[[], Recorder | None]) -> Iterator[None]:
    """What Inductor compiles within is interpreted, also when it is called later; `current()` is asked for a recorder."""
    from torch._inductor import compile_fx as module

    plain = module.compile_fx
    inner = _recording(current)

    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return plain(*args, **{"inner_compile": inner, **kwargs})

    module.compile_fx = compile_fx
    try:
        yield
    finally:
        module.compile_fx = plain
