"""Where the rows are: an abstract interpretation of a graph over which dimensions carry the batch.

The abstract value is the layout of a tensor, and `batch_rules.RULES` is the table of what each operator makes of it; an operator
that combines a dimension with a factor of rows mixes rows.

Where it starts: at the inputs that the caller says carry the batch (`inputs` finds them), whatever their sizes; and at a
value that is made from sizes, where its size holds a symbol of theirs. A caller who does not know (vLLM's graphs, whose
weights are static) gets each dimension whose size holds a batch symbol: a symbol of the first symbolic dimension of an
input that no later dimension has.

What it does not follow: which row goes where. A gather, a flip or a slice along the batch moves rows.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import SymInt, Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from ..errors import OptionError
from ..rewrite.fx_utils import as_list, subgraphs
from .batch_rules import rule_of
from .inputs import BatchInput
from .layout import Factor, Layout, as_one, carries, plain, size_of
from .moe_sort import COUNTED, PUT_BACK, Sorts
from .node import Node

#: node -> dimensions of its value (for several outputs: of the first) that the batch runs along
BatchDims = dict[fx.Node, frozenset[int]]


@dataclasses.dataclass
class Analysis:
    """What is known of one graph."""

    layouts: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    """The layout of each node's value; a tuple of them where it has several outputs."""
    mixed: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    """The nodes that combine several rows into one value, each with a sentence."""
    subgraphs: dict[fx.Node, list[tuple[str, fx.Graph, Analysis]]] = dataclasses.field(default_factory=dict)
    """The graphs that a higher-order operator holds, followed from its operands."""

    grouped: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    """The nodes that sort rows by group and count them, where the order is undone; each with a sentence."""

    def dims(self, node: fx.Node) -> tuple[int, ...]:
        """The dimensions of the node's value (of the first, if it has several) that carry rows."""
        layout = self.layouts.get(node)
        if not isinstance(node.meta.get("val"), Tensor):
            layout = next(iter(layout), None) if layout else None
        return tuple(i for i, dim in enumerate(layout or ()) if carries(dim))


#: the inputs that carry the batch; or placeholder -> its batch dimension; or None: what symbols say
Batch = Sequence[BatchInput] | Mapping[str, int] | None


def batch_dimensions(graph: fx.Graph, batch: Batch = None) -> BatchDims:
    """The batch dimensions of every node's value. Raises OptionError as `follow` does."""
    found = follow(graph, batch)
    return {node: frozenset(found.dims(node)) for node in graph.nodes}


def follow(graph: fx.Graph, batch: Batch = None) -> Analysis:
    """The layouts of every node's value, and the nodes that mix rows.

    Raises:
        OptionError: `batch` names an input or a dimension that does not exist.
    """
    if batch is None:
        return _Follower(batch_symbols(graph)).run(graph, {})
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    given = _placeholders(inputs, batch) if isinstance(batch, Mapping) else batch
    seeds: dict[fx.Node, Layout] = {}
    names: dict[fx.Node, str] = {}
    for i in given:
        node = inputs[i.position]
        value, names[node] = node.meta["val"], str(i)
        layout = list(seeds.get(node) or plain(value))
        rows = Factor(size_of(value.shape[i.dim]) // i.per_row, True)
        layout[i.dim] = (rows, Factor(i.per_row, False)) if i.per_row > 1 else (rows,)
        seeds[node] = tuple(layout)
    return _Follower(_symbols_of(inputs, seeds), names).run(graph, seeds)


def _placeholders(inputs: Sequence[fx.Node], named: Mapping[str, int]) -> list[BatchInput]:
    at = {node.name: i for i, node in enumerate(inputs)}
    found = []
    for name, dim in named.items():
        value = inputs[at[name]].meta.get("val") if name in at else None
        if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
            raise OptionError(
                f"batch={{{name!r}: {dim}}}: the graph has no input {name!r} with a dimension {dim}; its inputs are {', '.join(at)}"
            )
        found.append(BatchInput(at[name], name, dim % value.dim()))
    return found


def _symbols_of(inputs: Sequence[fx.Node], seeds: Mapping[fx.Node, Layout]) -> set[Any]:
    """The free symbols of the batch dimensions, without those of any other dimension: equal sizes share a symbol."""
    rows: set[Any] = set()
    others: set[Any] = set()
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            layout = seeds.get(node) or plain(value)
            for n, dim in zip(value.shape, layout, strict=True):
                symbols: set[Any] = n.node.expr.free_symbols if isinstance(n, SymInt) else set()
                if carries(dim) and len(dim) == 1:
                    rows |= symbols
                else:
                    others |= symbols
    return rows - others


def batch_symbols(graph: fx.Graph) -> set[Any]:
    """The free symbols of the first symbolic dimension of each input, without those of any later dimension.

    torch.compile gives equal sizes one symbol: where a batch is as long as its sequences nobody can tell them apart. A
    weight [K, N] of symbolic K beside an activation [M, K] makes M the batch, not K; and a dimension behind one of size 1
    is no batch: that 1 is (torch.compile gives a batch of one a graph of its own).
    """
    first: set[Any] = set()
    later: set[Any] = set()
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, Tensor):
            sizes: list[Any] = [n.node.expr.free_symbols if isinstance(n, SymInt) else n for n in value.shape]
            symbols = [n for n in sizes if isinstance(n, (set, frozenset)) and n]
            leading: Any = symbols[0] if symbols and 1 not in sizes[: sizes.index(symbols[0])] else set()
            first |= leading
            later |= set().union(*(symbols[1:] if leading else symbols))
    return first - later


class _Follower:
    """Goes through a graph, and through the graphs that it holds."""

    def __init__(self, symbols: set[Any], names: Mapping[fx.Node, str] | None = None) -> None:
        self.symbols = symbols
        self.names = names or {}

    def run(self, graph: fx.Graph, layouts: Mapping[fx.Node, Layout]) -> Analysis:
        found, sorts = Analysis(dict(layouts)), Sorts()
        for node in graph.nodes:
            if node not in found.layouts:
                found.layouts[node] = self.visit(node, found)
            put_back = sorts.visit(node, found.layouts)
            if put_back is not None:
                found.layouts[node] = put_back
        for sort in sorts.dims:
            if sort not in sorts.broken:
                found.mixed.pop(sort, None)
                found.grouped[sort] = PUT_BACK
            elif sort in found.mixed:
                found.mixed[sort] += f"; {sorts.broken[sort]}"
        found.grouped |= {node: COUNTED for node in sorts.counted if sorts.roles[node].sort not in sorts.broken}
        return found

    def visit(self, node: fx.Node, found: Analysis) -> Any:
        value = node.meta.get("val")
        if node.op == "call_function" and node.target is operator.getitem:
            whole, i = found.layouts.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
            layout = whole[i] if isinstance(whole, tuple) and isinstance(i, int) and i < len(whole) else ()
            return self.with_symbols(layout, value)
        if node.op != "call_function" or not any(isinstance(v, Tensor) for v in as_list(value)):
            if isinstance(node.target, HigherOrderOperator):
                self.hold(node, found)
            return self.with_symbols((), value)
        if isinstance(node.target, HigherOrderOperator):
            self.hold(node, found)
            return tuple(self.with_symbols(self.held(node, found, i), v) for i, v in enumerate(as_list(value)))
        if not isinstance(node.target, OpOverload) or not any(
            isinstance(a.meta.get("val"), Tensor) for a in node.all_input_nodes
        ):
            return self.each((), value)
        n = Node(node, found.layouts)
        layout, combined = rule_of(node.target)(n)
        for x, dim in combined:
            dims = found.layouts.get(x) or ()
            if dim < len(dims) and carries(dims[dim]) and node not in found.mixed:
                found.mixed[node] = (
                    f"combines the rows along the batch dimension {dim} of {x.name} {list(x.meta['val'].shape)}"
                    f"{self.origin(x, found)}: a row's result depends on the others by its meaning"
                )
        return self.each(layout, value)

    def origin(self, x: fx.Node, found: Analysis) -> str:
        """Which input's which dimension the rows of `x` come from; empty where no input was named."""
        seen, ahead = {x}, [x]
        while ahead:
            node = ahead.pop(0)
            if node in self.names:
                return f", which comes from {self.names[node]}"
            new = [n for n in node.all_input_nodes if n not in seen and found.dims(n)]
            seen.update(new)
            ahead += new
        return ""

    def each(self, layout: Any, value: Any) -> Any:
        """Layouts for each output; a rule that gave one layout gave it for all outputs of that rank."""
        if isinstance(value, Tensor):
            return self.with_symbols(layout, value)
        several = (
            bool(layout) and all(not dim or isinstance(dim[0], tuple) for dim in layout) and len(layout) == len(value)
        )
        return tuple(self.with_symbols(layout[i] if several else layout, v) for i, v in enumerate(value))

    def with_symbols(self, layout: Layout, value: Any) -> Layout:
        """The layout of a value; one that was made with a batch symbol in its size carries rows there."""
        if not isinstance(value, Tensor):
            return ()
        layout = layout if len(layout) == value.dim() else plain(value)
        if any(map(carries, layout)):
            return layout
        return tuple(
            (Factor(size_of(n), True),) if self.symbolic(n) else dim for dim, n in zip(layout, value.shape, strict=True)
        )

    def symbolic(self, n: Any) -> bool:
        return isinstance(n, SymInt) and bool(n.node.expr.free_symbols & self.symbols)

    def hold(self, node: fx.Node, found: Analysis) -> None:
        """Follow the rows into the graphs that a higher-order operator holds."""
        found.subgraphs[node] = []
        grown: list[Layout] | None = None
        for name, body, operands, sliced in subgraphs(node):
            inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
            given = grown or [found.layouts.get(x, ()) if isinstance(x, fx.Node) else () for x in operands]
            cut = [isinstance(x, fx.Node) and any(x is s for s in sliced) for x in operands]
            for x, layout, is_cut in zip(operands, given, cut, strict=True):
                if is_cut and layout and carries(layout[0]) and node.target.name() == "scan":  # type: ignore[union-attr]
                    found.mixed[node] = (
                        f"scans the rows along the batch dimension 0 of {x.name}{self.origin(x, found)}: a row's result depends on the others by its meaning"
                    )
            seeds = {
                i: self.with_symbols(layout[1:] if is_cut else layout, i.meta.get("val"))
                for i, layout, is_cut in zip(inputs, given, cut, strict=False)
            }
            found.subgraphs[node].append((name, body.graph, self.loop(node, body.graph, inputs, seeds)))
            if node.target.name() == "while_loop":  # type: ignore[union-attr]
                grown = [seeds[i] for i in inputs]

    def loop(self, node: fx.Node, graph: fx.Graph, inputs: list[fx.Node], seeds: dict[fx.Node, Layout]) -> Analysis:
        """A loop hands its results back as operands: rows that it brings into one are there from the start."""
        again = node.target.name() in ("while_loop", "scan")  # type: ignore[union-attr]
        while True:
            rows = self.run(graph, seeds)
            grown = False
            for i, out in zip(inputs, _outputs(graph), strict=False) if again else ():
                have, got = seeds.get(i, ()), rows.layouts.get(out, ())
                if isinstance(out, fx.Node) and len(have) == len(got):
                    union = tuple(h if carries(h) else g for h, g in zip(have, got, strict=True))
                    grown |= union != have and any(
                        carries(u) and not carries(h) for u, h in zip(union, have, strict=True)
                    )
                    seeds[i] = union
            if not grown:
                return rows

    def held(self, node: fx.Node, found: Analysis, i: int) -> Layout:
        """The layout of output `i`, from the graphs that compute it; results of slices are stacked along dimension 0."""
        value = as_list(node.meta["val"])[i]
        if not isinstance(value, Tensor):
            return ()
        out = plain(value)
        stacked = any(
            isinstance(x, fx.Node) and carries((found.layouts.get(x) or ((),))[0])
            for _, _, _, sliced in subgraphs(node)
            for x in sliced
        )
        for _, graph, rows in found.subgraphs.get(node, ()):
            outs = _outputs(graph)
            layout = rows.layouts.get(outs[i], ()) if i < len(outs) and isinstance(outs[i], fx.Node) else ()
            layout = ((Factor(0, stacked),), *layout) if len(layout) == value.dim() - 1 else layout
            if len(layout) == len(out):
                out = tuple(as_one(b, a[0].size) if carries(b) else a for a, b in zip(out, layout, strict=True))
        return out


def _outputs(graph: fx.Graph) -> list[Any]:
    (output,) = (n for n in graph.nodes if n.op == "output")
    return as_list(output.args[0])
