"""Rows that are sorted by group, meet their group's matrix and are put back: how a mixture of experts is written.

A sort along the batch mixes rows by its meaning. Not so where nothing but the order is taken from it and the order is undone:
each row then keeps its own values and its own group. `Sorts` follows what stands in the order of each such sort, from the sort
to the gather that undoes it, and knows no more than what is on that way. Anything else that touches a row in between, or a row
that leaves the graph in that order, is an objection to the sort.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from torch import SymInt, Tensor, fx

from ..rewrite.fx_utils import as_list, has_tensor, packet_of
from .layout import Dim, Layout, carries
from .node import Node
from .pointwise import is_pointwise

PUT_BACK = "sorted by group, and put back: every row keeps its own values and its own group"
COUNTED = "counts the rows of each group, which says where its rows begin and nothing of what they hold"
_SORTS = ("sort", "argsort")
_CASTS = (
    "_to_copy",
    "convert_element_type",
    "_npu_dtype_cast",
    "npu_dtype_cast",
    "to",
    "clone",
    "contiguous",
    "detach",
    "alias",
)
_VIEWS = (
    "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "chunk", "view", "reshape", "_unsafe_view", "expand",
)  # fmt: skip
_GATHERS = ("index", "_unsafe_index", "index_select")
#: not pointwise, yet each row of the result is made of the same row alone
_ROW_BY_ROW = ("npu_swiglu", *_CASTS)


#: what a value can be to a sort
ROLES = {
    "sort": "both results of the sort",
    "keys": "the sorted keys",
    "order": "the indices that sort",
    "source": "for each sorted row the token that it comes from: the order, divided by the experts of a token",
    "rows": "rows in that order",
    "parts": "several tensors of rows in that order",
    "counts": "how many rows each group has",
    "ends": "where each group's rows end",
    "resort": "both results of sorting the order",
    "back": "the indices that undo the order",
}


@dataclasses.dataclass(frozen=True)
class Role:
    """What a value is to the sort that it comes from: see `ROLES`."""

    sort: fx.Node
    name: str


class Sorts:
    """The sorts of one graph."""

    def __init__(self) -> None:
        self.roles: dict[fx.Node, Role] = {}
        self.dims: dict[fx.Node, Dim] = {}
        """sort -> the dimension of rows before it"""
        self.broken: dict[fx.Node, str] = {}
        """sort -> what takes more from it than an order that is undone"""
        self.counted: set[fx.Node] = set()

    def visit(self, node: fx.Node, layouts: Mapping[fx.Node, Any]) -> Layout | None:
        """Follow one node, its inputs before it. The rows' dimension of a value that is put back; None for all others."""
        given = {x: self.roles[x] for x in node.all_input_nodes if x in self.roles}
        if given and node.op == "output":
            for role in given.values():
                self.broken.setdefault(role.sort, "the graph returns rows in that order")
            return None
        n = Node(node, layouts)
        if not given:
            self._begin(n)
            return None
        sorts = {s.sort for s in given.values()}
        if node.op == "call_function" and not has_tensor(node):
            return None  # a size
        found = self._next(n, given) if node.op == "call_function" and len(sorts) == 1 else None
        (sort, *others) = sorts
        if found == "put back":
            return (self.dims[sort], *n.layout(node.args[0])[1:])
        if found == "blank":
            return None
        if found is None:
            for s in (sort, *others):
                self.broken.setdefault(s, f"{node.name} takes rows in that order")
            return None
        if found in ("counts", "ends"):
            self.counted.add(node)
        self.roles[node] = Role(sort, found)
        return None

    def _begin(self, n: Node) -> None:
        if n.packet not in _SORTS or n.arg("descending"):
            return
        layout = n.layout(n.node.args[0])
        if len(layout) == 1:  # in a graph of static shapes nobody knows whether these are rows
            self.dims[n.node] = layout[0]
            self.roles[n.node] = Role(n.node, "order" if n.packet == "argsort" else "sort")

    def _next(self, n: Node, given: Mapping[fx.Node, Role]) -> str | None:
        """What the node's value is to the sort, "put back", "blank" for new memory, or None: it is not on the way."""
        node, name = n.node, n.packet
        roles = {s.name for s in given.values()}
        first = given.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if node.target is operator.getitem and first:
            i = node.args[1]
            pairs = {("sort", 0): "keys", ("sort", 1): "order", ("resort", 1): "back", ("parts", i): "rows"}
            return pairs.get((first.name, i))
        if name in ("empty_like", "new_empty", "empty", "zeros_like", "new_zeros", "full_like"):
            return "blank"
        if name in _CASTS and len(given) == 1:
            return next(iter(roles))
        if name == "copy_" and first is None and list(n.value.shape) == list(next(iter(given)).meta["val"].shape):
            return next(iter(roles))  # written over the whole of another tensor
        if roles == {"order"}:
            return self._from_order(n)
        by = _one_index(node) if name in _GATHERS else None
        if by is not None and by in given:
            index = given[by].name
            if index == "source" and first is None:
                return "rows"
            return "put back" if index == "back" and first and first.name in ("rows", "keys") else None
        if name in ("histc", "bincount") and roles == {"keys"}:
            keys = given[n.first].sort.args[0]
            return "counts" if name == "bincount" or _counts_from_zero(n, keys) else None
        if name == "cumsum" and roles == {"counts"}:
            return "ends"
        if name in ("grouped_mm", "_grouped_mm") and first and first.name == "rows":
            offs = n.arg("offs")
            rest = [x for x in node.all_input_nodes if x is not node.args[0] and x is not offs]
            plain = not any(x in given or any(map(carries, n.layout(x))) for x in rest)
            wanted = "counts" if n.arg("counts") else "ends"
            return "rows" if offs in given and given[offs].name == wanted and plain else None
        if roles <= {"rows", "keys"}:
            return self._row_by_row(n, given)
        return None

    def _from_order(self, n: Node) -> str | None:
        node, name = n.node, n.packet
        floor = name == "floor_divide" or (name == "div" and node.kwargs.get("rounding_mode") == "floor")
        if floor and isinstance(node.args[1], int):
            return "source"
        if name in _GATHERS and _one_index(node) in self.roles and node.args[0] not in self.roles:
            return "rows"
        if name in _SORTS and not n.arg("descending"):
            return "back" if name == "argsort" else "resort"
        if name in ("index_put", "index_put_", "_unsafe_index_put") and _one_index(node) in self.roles:
            written = node.args[2]
            if not isinstance(written, fx.Node) or packet_of(written) not in ("arange", "iota"):
                return None
            numbers = Node(written, n.layouts)
            from_zero = numbers.arg("start") in (None, 0) and numbers.arg("step") in (None, 1)
            return "back" if from_zero and not n.arg("accumulate") else None
        return None

    def _row_by_row(self, n: Node, given: Mapping[fx.Node, Role]) -> str | None:
        """Pointwise operators, and views that leave dimension 0 alone."""
        node, name, value = n.node, n.packet, n.value
        several = isinstance(value, (tuple, list))
        shapes = [v.shape for v in as_list(value)]
        # dimension 0 stays dimension 0
        if any(len(s) == 0 or not _same(s[0], x.meta["val"].shape[0]) for s in shapes for x in given):
            return None
        if (is_pointwise(node.target) or name in _ROW_BY_ROW) and not several:
            rank = len(shapes[0])
            # what else takes part is the same for every row
            plain = all(
                not isinstance(v := x.meta.get("val"), Tensor)
                or ((v.dim() < rank or v.shape[0] == 1) and not any(map(carries, n.layout(x))))
                for x in node.all_input_nodes
                if x not in given
            )
            return "rows" if plain and all(x.meta["val"].dim() == rank for x in given) else None
        rank = len(next(iter(given)).meta["val"].shape)
        if name not in _VIEWS:
            return None
        dim = n.arg("dim")
        # a slice of all of dimension 0 takes nothing away
        if name != "slice" and isinstance(dim, int) and dim % (rank + (name == "unsqueeze")) == 0:
            return None
        return "parts" if several else "rows"


def _one_index(node: fx.Node) -> fx.Node | None:
    """The index of a gather or a write along dimension 0 alone."""
    if packet_of(node) == "index_select":
        return node.args[2] if node.args[1] == 0 else None  # type: ignore[return-value]
    indices: Any = node.args[1]
    return indices[0] if len([i for i in indices if i is not None]) == 1 and indices[0] is not None else None


def _counts_from_zero(histc: Node, keys: Any) -> bool:
    """Whether every key is counted but those behind the last group: one before the first would move all groups."""
    return histc.arg("min") == 0 and bool(histc.arg("max")) and _not_negative(keys)


def _not_negative(x: Any) -> bool:
    """By its making: indices, magnitudes, remainders of a positive number."""
    while isinstance(x, fx.Node) and packet_of(x) in (*_CASTS, *_VIEWS):
        x = x.args[0]
    if not isinstance(x, fx.Node):
        return False
    if x.target is operator.getitem:
        made: Any = x.args[0]
        return packet_of(made) in ("topk", "sort", "max", "min") and bool(x.args[1] == 1)
    if packet_of(x) == "remainder":
        return isinstance(x.args[1], int) and x.args[1] > 0
    return packet_of(x) in ("argmax", "argmin", "argsort", "arange", "abs")


def _same(a: Any, b: Any) -> bool:
    """Equal sizes, as expressions."""
    if isinstance(a, SymInt) and isinstance(b, SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b
