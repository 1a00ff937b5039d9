"""Find operators that an earlier stage took apart, with Inductor's pattern matcher, and replace them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import (
    CallFunction,
    Match,
    PatternExpr,
    PatternMatcherPass,
    fwd_only,
    fx_to_pattern,
    register_graph_pattern,
)
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..table import Entry, Pass, Pattern
from .fx_utils import fake_mode_of
from .splice import Change, Tracer, splice

aten = torch.ops.aten


def _trace_captured(fn: Callable[..., Any], args: Any, **_: Any) -> fx.GraphModule:
    """Trace without any decomposition: the form in which AOTAutograd captures a program."""
    gm = make_fx(fn, tracing_mode="real")(*args)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


#: stage -> how a pattern is traced to the form that it has there
_TRACE: dict[str, Callable[..., Any]] = {"captured": _trace_captured, "post_grad": fwd_only, "final": fwd_only}


def _keywords_match(match: Match) -> bool:
    """Whether the nodes have no other keywords than the pattern, but for defaults: Inductor's matcher ignores them."""
    for expression, node in match.ctx.pattern_to_node.items():
        if isinstance(expression, CallFunction) and isinstance(node, fx.Node) and isinstance(node.target, OpOverload):
            default = {a.name: a.default_value for a in node.target._schema.arguments}
            if any(value != default.get(key) for key, value in node.kwargs.items() if key not in expression.kwargs):
                return False
    return True


def _fits(pattern: Pattern, match: Match) -> bool:
    if not _keywords_match(match):
        return False
    outputs = [n for n in match.output_nodes() if n is not None]
    if len(outputs) > 1 and any(n >= min(outputs) for n in match.kwargs.values() if isinstance(n, fx.Node)):
        return False  # one of the values is used before all arguments are there
    values = {k: v.meta.get("val") if isinstance(v, fx.Node) else v for k, v in match.kwargs.items()}
    return pattern.fits is None or pattern.fits(**values)


def _traced(pattern: Pattern, stage: str) -> PatternExpr:
    """What Inductor's matcher looks for; the constants in it have to match too."""
    gm = _TRACE[stage](pattern.search, [*pattern.examples(), *pattern.scalars.values()])
    names = list(inspect.signature(pattern.search).parameters)
    return fx_to_pattern(gm, ignore_types=(), argnames=names, scalar_workaround=pattern.scalars)


@functools.cache
def _forms(p: type[Pass], stage: str) -> list[tuple[Pattern, PatternExpr]]:
    with FakeTensorMode(), torch.no_grad():
        return [(pattern, _traced(pattern, stage)) for pattern in p.patterns]


_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.var_mean.correction)


def _normalize(graph: fx.Graph) -> None:
    """Write what programs write in two ways as the patterns do: the last dimension as -1, `x + eps` as `add.Tensor`."""
    for node in graph.nodes:
        if node.target in _REDUCTIONS and len(node.args) > 1 and isinstance(node.args[0], fx.Node):
            value = node.args[0].meta.get("val")
            if isinstance(value, torch.Tensor) and value.dim() and node.args[1] == [value.dim() - 1]:
                node.update_arg(1, [-1])
        elif node.target is aten.add.Scalar and any(user.target is aten.rsqrt.default for user in node.users):
            node.target = aten.add.Tensor


def replace(graph: fx.Graph, p: type[Pass], stage: str) -> list[Change]:
    """Replace the pass's patterns in `graph`; returns what was done."""
    if not p.patterns:
        return []
    _normalize(graph)
    changes: list[Change] = []
    matcher = PatternMatcherPass(pass_name=f"bi_compile_{p.name}_{stage}")
    tracer = Tracer(fake_mode_of(graph), {})
    for pattern, form in _forms(p, stage):  # type: ignore[arg-type]  # a class is hashable
        register_graph_pattern(form, extra_check=functools.partial(_fits, pattern), pass_dict=matcher)(
            functools.partial(_replace_match, pattern, p, tracer, changes)
        )
    if matcher.apply(graph):
        graph.eliminate_dead_code()
    return changes


def _replace_match(
    pattern: Pattern, p: type[Pass], tracer: Tracer, changes: list[Change], match: Match, **arguments: Any
) -> None:
    # torch.compile(dynamic=True) may turn a Python number into an input of the graph; the replacement needs the number
    if any(isinstance(arguments[name], fx.Node) for name in pattern.scalars):
        return
    given = tuple(arguments[name] for name in inspect.signature(pattern.replace).parameters)
    entry = Entry(pattern.name, pattern.replace, why="", source="", unless=None, targets=None, pass_name=p.name)
    whole = _as_one_node(match, [n for n in match.output_nodes() if n is not None])
    whole.args, whole.kwargs = given, {}
    changes.append(
        dataclasses.replace(splice(match.graph, whole, entry, pattern.replace, tracer), operator=pattern.name)
    )
    match.erase_nodes()  # or a smaller pattern would find itself in what is left of them


def _as_one_node(match: Match, outputs: list[fx.Node]) -> fx.Node:
    """The node whose value the replacement's is: the pattern's last, or, for several, one of which they are the elements."""
    if len(outputs) == 1:
        return outputs[0]
    first = min(outputs)
    with match.graph.inserting_before(first):
        whole = match.graph.call_function(_elements)
        whole.meta = {**first.meta, "val": tuple(n.meta["val"] for n in outputs)}
        for i, n in enumerate(outputs):
            element = match.graph.call_function(operator.getitem, (whole, i))
            element.meta = dict(n.meta)
            n.replace_all_uses_with(element)
    return whole


def _elements() -> None:
    """Stands for a match of several values until its replacement does."""
