"""Where the rows are: which dimensions of a graph's values the batch runs along, and which nodes reduce over one.

With symbolic shapes a dimension is a batch dimension if its size holds a batch symbol, and the batch symbols are those of
the first symbolic dimension of each graph input that no later dimension has. With static shapes the caller names a
dimension of some inputs, and the dimensions are followed from node to node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._ops import OpOverload

from .errors import OptionError
from .ops import NAMESPACE

#: node -> dimensions of its value (for several outputs: of the first) that the batch runs along
BatchDims = dict[fx.Node, frozenset[int]]


def batch_dimensions(graph: fx.Graph, named: Mapping[str, int] | None = None) -> BatchDims:
    """The batch dimensions of every node's value.

    Raises:
        OptionError: `named` names an input or a dimension that does not exist.
    """
    if named is None:
        symbols = batch_symbols(graph)
        return {node: _holding(_value(node), symbols) for node in graph.nodes}
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    dims: BatchDims = {}
    for name, dim in named.items():
        value = _value(inputs[name]) if name in inputs else None
        if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
            raise OptionError(
                f"batch={{{name!r}: {dim}}}: the graph has no input {name!r} with a dimension {dim}; its inputs are {', '.join(inputs)}"
            )
        dims[inputs[name]] = frozenset({dim % value.dim()})
    for node in graph.nodes:
        if node not in dims:
            dims[node] = _follow(node, dims)
    return dims


def batch_symbols(graph: fx.Graph) -> set[Any]:
    """The free symbols of the first symbolic dimension of each input, without those of any later dimension.

    torch.compile gives equal sizes one symbol: where a batch is as long as its sequences nobody can tell them apart. A
    weight [K, N] of symbolic K beside an activation [M, K] makes M the batch, not K; and a dimension behind one of size 1
    is no batch: that 1 is (torch.compile gives a batch of one a graph of its own).
    """
    first: set[Any] = set()
    later: set[Any] = set()
    for node in graph.nodes:
        value = _value(node) if node.op == "placeholder" else None
        if isinstance(value, Tensor):
            sizes = [n.node.expr.free_symbols if isinstance(n, SymInt) else n for n in value.shape]
            symbols = [n for n in sizes if isinstance(n, (set, frozenset)) and n]
            leading = symbols[0] if symbols and 1 not in sizes[: sizes.index(symbols[0])] else set()
            first |= leading
            later |= set().union(*(symbols[1:] if leading else symbols))
    return first - later


def _value(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _holding(value: Any, symbols: set[Any]) -> frozenset[int]:
    if not isinstance(value, Tensor):
        return frozenset()
    return frozenset(
        i for i, n in enumerate(value.shape) if isinstance(n, SymInt) and n.node.expr.free_symbols & symbols
    )


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    assert isinstance(node.target, OpOverload)
    for i, a in enumerate(node.target._schema.arguments):
        if a.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, a.default_value)
    return default


# -- reductions over a batch dimension ------------------------------------------------------------------------------

_REDUCE = """sum mean prod amax amin aminmax max min argmax argmin any all var std var_mean std_mean norm linalg_vector_norm
logsumexp softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp sort topk argsort kthvalue
median mode count_nonzero""".split()
#: operator -> dimensions of its first argument that it combines
_CONTRACT = {"mm": (1,), "addmm": (1,), "bmm": (2,), "baddbmm": (2,), "dot": (0,), "mv": (1,)}
#: operator -> dimensions of its first argument that it normalises over, counted from the end or the start
_NORMALISE = {
    "rms_norm": slice(-1, None),
    "add_rms_norm": slice(-1, None),
    "layer_norm": slice(-1, None),
    "group_norm": slice(1, None),
}


def mixed_dimension(node: fx.Node, batch: BatchDims) -> str | None:
    """A sentence if the node combines several rows of the batch into one value, else None."""
    if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "prims", NAMESPACE):
        return None
    packet = node.target._overloadpacket.__name__
    first = next(
        (a for a in (node.args[1:] if packet in ("addmm", "baddbmm") else node.args) if isinstance(a, fx.Node)), None
    )
    if first is None or not batch.get(first) or not isinstance(_value(first), Tensor):
        return None
    rank = _value(first).dim()
    if packet in _CONTRACT:
        reduced: Sequence[int] = _CONTRACT[packet]
    elif packet in _NORMALISE and node.target.namespace == NAMESPACE:
        reduced = range(rank)[_NORMALISE[packet]]
    elif packet in _REDUCE and not (
        packet in ("max", "min") and len([a for a in node.args if isinstance(a, fx.Node)]) > 1
    ):
        dim = _argument(node, "dim", _argument(node, "dims"))
        reduced = (
            range(rank)
            if dim is None or dim == []
            else [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
            if rank
            else []
        )
    else:
        return None
    hit = sorted(set(reduced) & batch[first])
    if not hit:
        return None
    return f"combines the rows along the batch dimension {hit[0]} of {first.name} {list(_value(first).shape)}: a row's result depends on the others by its meaning"


# -- following a named dimension through static shapes --------------------------------------------------------------


def _same(node: fx.Node, source: fx.Node, dims: frozenset[int]) -> frozenset[int]:
    return dims


def _align_right(node: fx.Node, source: fx.Node, dims: frozenset[int]) -> frozenset[int]:
    shift = _value(node).dim() - _value(source).dim()
    return frozenset(d + shift for d in dims if d + shift >= 0)


def _permuted(node: fx.Node, source: fx.Node, dims: frozenset[int]) -> frozenset[int]:
    packet, rank = node.target._overloadpacket.__name__, _value(source).dim()  # type: ignore[union-attr]
    order = list(range(rank))
    if packet == "permute":
        order = [d % rank for d in _argument(node, "dims")]
    elif packet == "t":
        order = order[::-1]
    else:
        a, b = _argument(node, "dim0") % rank, _argument(node, "dim1") % rank
        order[a], order[b] = order[b], order[a]
    return frozenset(order.index(d) for d in dims)


def _viewed(node: fx.Node, source: fx.Node, dims: frozenset[int]) -> frozenset[int]:
    """A dimension of the result is a batch dimension if it shares elements' coordinates with one of the source's."""
    old, new = list(_value(source).shape), list(_value(node).shape)
    found, i, j = set(), 0, 0
    while i < len(old) and j < len(new):
        group_old, group_new = [i], [j]
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while a != b and (i < len(old) or j < len(new)):
            if a < b and i < len(old):
                a *= old[i]
                group_old.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                group_new.append(j)
                j += 1
            else:
                break
        # a dimension of size 1 carries nothing where there are others
        group_old, group_new = ([d for d in g if x[d] != 1] or g for g, x in ((group_old, old), (group_new, new)))
        hit = [d for d in group_old if d in dims]
        if (hit and len(group_old) == 1) or (hit and hit[0] == group_old[0]):
            # the outermost of a merged or split group carries the rows; a merged one carries them in all
            found.add(group_new[0])
        elif hit:
            found.update(group_new)
    return frozenset(found)


def _dropped(node: fx.Node, source: fx.Node, dims: frozenset[int]) -> frozenset[int]:
    rank = _value(source).dim()
    if _value(node).dim() == rank:
        return dims
    dim = _argument(node, "dim")
    gone = (
        {d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim if dim is not None else 0])}
        if rank
        else set()
    )
    if node.target._overloadpacket.__name__ == "squeeze":  # type: ignore[union-attr]
        gone = {d for d in (gone if dim is not None else range(rank)) if _value(source).shape[d] == 1}
    kept = [d for d in range(rank) if d not in gone]
    return frozenset(kept.index(d) for d in dims if d in kept)


def _inserted(node: fx.Node, source: fx.Node, dims: frozenset[int]) -> frozenset[int]:
    at = _argument(node, "dim") % _value(node).dim()
    return frozenset(d + (d >= at) for d in dims)


_FLOW: dict[str, Callable[[fx.Node, fx.Node, frozenset[int]], frozenset[int]]] = {
    **dict.fromkeys(("permute", "t", "transpose"), _permuted),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "_reshape_copy", "flatten"), _viewed),
    **dict.fromkeys(("select", "squeeze", *_REDUCE), _dropped),
    "unsqueeze": _inserted,
}
#: the rows of a product are those of its first operand, the columns those of its second
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def _follow(node: fx.Node, dims: BatchDims) -> frozenset[int]:
    value = _value(node)
    sources = [a for a in node.all_input_nodes if dims.get(a) and isinstance(_value(a), Tensor)]
    if not isinstance(value, Tensor) or not sources or not math.prod(value.shape):
        return frozenset()
    packet = node.target._overloadpacket.__name__ if isinstance(node.target, OpOverload) else ""
    if packet in _PRODUCTS:
        a, b = node.args[1:3] if packet in ("addmm", "baddbmm") else node.args[:2]
        last = value.dim() - 1
        rows = {d for d in dims.get(a, ()) if d < last}  # type: ignore[arg-type]
        return frozenset(rows | {d for d in dims.get(b, ()) if d == last or d < last - 1})  # type: ignore[arg-type]
    if packet == "embedding":
        return dims.get(node.args[1], frozenset())  # type: ignore[arg-type]
    flow = _FLOW.get(packet)
    if flow is not None:
        return flow(node, sources[0], dims[sources[0]])
    if (
        isinstance(node.target, OpOverload)
        and torch.Tag.pointwise not in node.target.tags
        and packet not in ("expand", "clone", "cat")
    ):
        # an operator of which nothing more is known: a dimension stays where its size does
        return frozenset(
            d for s in sources for d in dims[s] if d < value.dim() and value.shape[d] == _value(s).shape[d]
        )
    return frozenset().union(*(_align_right(node, s, dims[s]) for s in sources))
