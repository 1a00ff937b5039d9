"""Find operators that an earlier stage took apart, with Inductor's pattern matcher, and put a replacement in their place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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


#: stage -> how the searched-for form is traced
_TRACE: dict[str, Callable[..., Any]] = {"captured": _trace_captured, "post_grad": fwd_only, "final": fwd_only}


def _says_all(match: Match) -> bool:
    """Whether the searched-for form holds every keyword of the nodes: the matcher passes over those that only a node has."""
    for expression, node in match.ctx.pattern_to_node.items():
        if isinstance(expression, CallFunction) and isinstance(node, fx.Node) and isinstance(node.target, OpOverload):
            default = {a.name: a.default_value for a in node.target._schema.arguments}
            if any(value != default.get(key) for key, value in node.kwargs.items() if key not in expression.kwargs):
                return False
    return True


def _searched(pattern: Pattern, stage: str) -> PatternExpr:
    """The form that is looked for, traced from the plain definition; its constants count."""
    traced = _TRACE[stage](pattern.search, [*pattern.examples(), *pattern.scalars.values()])
    names = list(inspect.signature(pattern.search).parameters)
    return fx_to_pattern(traced, ignore_types=(), argnames=names, scalar_workaround=pattern.scalars)


@functools.cache
def _forms(p: type[Pass], stage: str) -> list[tuple[Pattern, PatternExpr]]:
    with FakeTensorMode(), torch.no_grad():
        return [(pattern, _searched(pattern, stage)) for pattern in p.patterns]


_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.var_mean.correction)


def _spell_alike(graph: fx.Graph) -> None:
    """Write the last dimension as -1, and an eps added as `add.Scalar` as `add.Tensor`, as the searched-for forms do."""
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
    _spell_alike(graph)
    changes: list[Change] = []
    matcher = PatternMatcherPass(pass_name=f"bi_compile_{p.name}_{stage}")
    tracer = Tracer(fake_mode_of(graph), {})
    for pattern, form in _forms(p, stage):  # type: ignore[arg-type]  # a class is hashable
        register_graph_pattern(form, extra_check=_says_all, pass_dict=matcher)(  # type: ignore[arg-type]
            functools.partial(_put_in_place, pattern, p, tracer, changes)
        )
    if matcher.apply(graph):
        graph.eliminate_dead_code()
    return changes


def _put_in_place(
    pattern: Pattern, p: type[Pass], tracer: Tracer, changes: list[Change], match: Match, **arguments: Any
) -> None:
    # torch.compile(dynamic=True) may make a graph input of a Python number, which no operator takes
    if any(isinstance(arguments[name], fx.Node) for name in pattern.scalars):
        return
    last = match.output_node()
    last.args, last.kwargs = tuple(arguments[name] for name in inspect.signature(pattern.replace).parameters), {}
    entry = Entry(pattern.name, pattern.replace, why="", source="", unless=None, targets=None, pass_name=p.name)
    changes.append(
        dataclasses.replace(splice(match.graph, last, entry, pattern.replace, tracer), operator=pattern.name)
    )
