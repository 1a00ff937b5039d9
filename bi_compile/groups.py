"""Find groups of nodes that an earlier stage took apart, with Inductor's pattern matcher, and put operators in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import CallFunction, Match, PatternMatcherPass, fwd_only, register_replacement
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .rewrite import Change, source_line
from .table import Group, Pass

aten = torch.ops.aten


def _trace_captured(fn: Callable[..., Any], args: Any, **_: Any) -> fx.GraphModule:
    """Trace without any decomposition: the form in which AOTAutograd captures a program."""
    gm = make_fx(fn, tracing_mode="real")(*args)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


#: stage -> how the searched-for form is traced
_TRACE: dict[str, Callable[..., Any]] = {"captured": _trace_captured, "final": fwd_only}


def _says_all(match: Match) -> bool:
    """Whether the searched-for form holds every keyword of the nodes: the matcher passes over those that only a node has."""
    for expression, node in match.ctx.pattern_to_node.items():
        if isinstance(expression, CallFunction) and isinstance(node, fx.Node) and isinstance(node.target, OpOverload):
            default = {a.name: a.default_value for a in node.target._schema.arguments}
            if any(value != default.get(key) for key, value in node.kwargs.items() if key not in expression.kwargs):
                return False
    return True


class _Recorder:
    """Notes each match of a group, as Changes."""

    def __init__(self, group: Group, p: type[Pass], changes: list[Change]) -> None:
        self.group, self.p, self.changes = group, p, changes

    def __call__(self, match: Match) -> bool:
        # torch.compile(dynamic=True) may make a graph input of a Python number; a plain one stands in the form itself
        if any(isinstance(match.kwargs.get(name), fx.Node) for name in self.group.scalars):
            return False
        if not _says_all(match):
            return False
        last = match.output_node() if match.output_nodes() else match.nodes[-1]
        self.changes.append(
            Change(
                last.name, self.group.name, self.p.name, (f"bi_compile.{self.group.name}.default",), source_line(last)
            )
        )
        return True


@functools.cache
def _matcher(p: type[Pass], stage: str) -> tuple[PatternMatcherPass, list[Change]]:
    changes: list[Change] = []
    matcher = PatternMatcherPass(pass_name=f"bi_compile_{p.name}_{stage}")
    with FakeTensorMode(), torch.no_grad():
        for group in p.groups:
            register_replacement(
                group.search,
                group.replace,
                group.examples(),
                _TRACE[stage],
                matcher,
                scalar_workaround=group.scalars or None,
                extra_check=_Recorder(group, p, changes),
                skip_duplicates=True,
            )
    return matcher, changes


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
    """Replace the pass's groups in `graph`; returns what was done."""
    if not p.groups:
        return []
    matcher, changes = _matcher(p, stage)  # type: ignore[arg-type]  # a class is hashable
    changes.clear()
    _spell_alike(graph)
    if matcher.apply(graph):
        graph.eliminate_dead_code()
    return list(changes)
