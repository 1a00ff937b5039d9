"""A verdict on every node of the graph that will run.

The verdict on an operator by itself is `spec`'s. In addition an operator that combines a dimension which carries rows (see
`batch_dims`) mixes rows, whatever its order. Graphs within the graph (cond, while_loop, scan, map, invoke_subgraph) are
judged with it; any other higher-order operator is unproven.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from ..errors import AuditError
from ..rewrite.fx_utils import source_line, values_of
from . import batch_dims
from .spec import ALLOWED, Call, Knowledge, Verdict, judge


@dataclasses.dataclass(frozen=True)
class Finding:
    """The verdict on one node."""

    node: str
    operator: str
    verdict: Verdict
    reason: str
    where: str
    rows_in: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Input node -> the dimensions of its value that carry rows."""
    rows_out: tuple[int, ...] = ()
    """The dimensions of the (first) result that carry rows."""
    value: str = ""
    """dtype and size of each result."""
    arguments: str = ""
    """The arguments; a node by its name."""

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}) {self.verdict.value}: {self.reason}{' — ' + self.where if self.where else ''}"


@dataclasses.dataclass(frozen=True)
class Report:
    """The audit of one graph."""

    target: str
    findings: tuple[Finding, ...]

    @property
    def objections(self) -> tuple[Finding, ...]:
        """The findings that keep the graph from being batch-invariant."""
        return tuple(f for f in self.findings if f.verdict not in ALLOWED)

    def counts(self) -> dict[str, int]:
        return dict(Counter(f.verdict.value for f in self.findings))

    def raise_objections(self) -> None:
        """Raise AuditError if there are objections."""
        if self.objections:
            raise AuditError(
                "this graph is not known to be batch-invariant:\n" + "\n".join(f"  {f}" for f in self.objections)
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "counts": self.counts(),
            "nodes": [{**dataclasses.asdict(f), "verdict": f.verdict.value} for f in self.findings],
        }


def audit(graph: fx.Graph, knowledge: Knowledge, batch: batch_dims.Batch = None) -> Report:
    """Judge every node, also of the graphs that higher-order operators hold.

    Args:
        graph: with fake values in `meta["val"]`.
        batch: the inputs that carry the batch, or placeholder -> its batch dimension. None: a batch dimension is one whose
            size holds the free symbol of the first symbolic dimension of an input.
    """
    return Report(knowledge.target.name, tuple(_findings(graph, knowledge, batch_dims.follow(graph, batch), "")))


def _findings(graph: fx.Graph, known: Knowledge, found: batch_dims.Analysis, inside: str) -> Iterator[Finding]:
    for node in graph.nodes:
        verdict, reason = _judge_node(node, known, found)
        yield Finding(
            inside + node.name,
            operator_name(node),
            verdict,
            reason,
            source_line(node),
            {x.name: found.dims(x) for x in node.all_input_nodes if found.dims(x)},
            found.dims(node),
            described(value_of_node(node)),
            argument_text(node),
        )
        for name, graph, inner in found.subgraphs.get(node, ()):
            yield from _findings(graph, known, inner, f"{inside}{node.name}/{name}/")


_NOT_COMPUTED = {"placeholder": "an input", "get_attr": "a constant", "output": "the output"}


def _judge_node(node: fx.Node, known: Knowledge, found: batch_dims.Analysis) -> tuple[Verdict, str]:
    if node.op in _NOT_COMPUTED:
        return Verdict.ROW_LOCAL, _NOT_COMPUTED[node.op]
    if node in found.mixed:
        if _only_asserted(node):
            return Verdict.ROW_LOCAL, "asserted and nothing else: no row's result holds it"
        return Verdict.MIXES_ROWS, found.mixed[node]
    if node in found.grouped:
        return Verdict.ROW_LOCAL, found.grouped[node]
    if node.target is operator.getitem:
        return Verdict.ROW_LOCAL, "one of several outputs"
    is_operator = isinstance(node.target, (OpOverload, HigherOrderOperator))
    if not is_operator and not isinstance(node.meta.get("val"), Tensor):
        return Verdict.ROW_LOCAL, "arithmetic on sizes"
    if found.subgraphs.get(node):
        return Verdict.ROW_LOCAL, "the graphs that it holds are judged with it"
    return judge(call_of(node), known)


def _only_asserted(node: fx.Node) -> bool:
    """Whether all that is made of a node's value is a test that stops the program."""
    todo = [node]
    while todo:
        users = list(todo.pop().users)
        if not users:
            return False
        todo += [u for u in users if not str(u.target).startswith(("aten._assert", "aten._functional_assert"))]
    return True


def call_of(node: fx.Node) -> Call:
    """What a node calls; a mutable operator that was made functional goes by its own name."""
    kind = node.target.name() if isinstance(node.target, HigherOrderOperator) else ""
    if kind and not kind.startswith("auto_functionalized"):  # what it holds has no values
        return Call(node.target, node.args, node.kwargs)
    args, kwargs = values_of(node)
    if kind:
        return Call(args[0], args[1:], kwargs, complete=kind == "auto_functionalized")
    return Call(node.target, args, kwargs)


def operator_name(node: fx.Node) -> str:
    """What a node calls, as the verdict names it."""
    if isinstance(node.target, HigherOrderOperator):
        if node.target.name().startswith("auto_functionalized"):
            return str(node.args[0])
        return Call(node.target, (), node.kwargs).name
    return str(node.target)


def argument_text(node: fx.Node) -> str:
    """The node's arguments; a node by its name."""
    return _without_addresses(", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]))


def value_of_node(node: fx.Node) -> Any:
    """The node's value; a constant's from the module that holds it, where no compiler has noted it."""
    owner = node.graph.owning_module
    if node.op == "get_attr" and "val" not in node.meta and owner is not None:
        held = getattr(owner, str(node.target), None)
        return held if isinstance(held, Tensor) else None
    return node.meta.get("val")


def _without_addresses(text: str) -> str:
    """The addresses of objects differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def described(value: Any) -> str:
    """`dtype[sizes]` of each tensor of a value; an opaque object by its type."""
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return ", ".join(
        f"{str(v.dtype).removeprefix('torch.')}[{', '.join(map(str, v.shape))}]"
        if isinstance(v, Tensor)
        else type(v.real_obj).__name__
        if hasattr(v, "real_obj")
        else _without_addresses(str(v))
        for v in leaves
        if v is not None
    )
