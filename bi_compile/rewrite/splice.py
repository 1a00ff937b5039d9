"""Put replacements in the place of nodes: each replacement is traced on the node's own fake values and spliced in.

What a graph must be: an FX graph of operator overloads whose nodes carry fake values in `meta["val"]`, as AOTAutograd and
Inductor hand them on. What it is afterwards: the same, with `meta`, stack traces and the strides of the replaced values.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import RewriteError
from ..table import Entry, Replacement, Table
from ..user_code import inherited
from .fx_utils import fake_mode_of, source_line, value_of, values_of

Decompositions = dict[OpOverload, Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Change:
    """One replacement that was made."""

    node: str
    operator: str
    pass_name: str
    by: tuple[str, ...]
    """The operators that stand there now."""
    where: str
    """The line of the user's program, where it is known."""


def rewrite(
    graph: fx.Graph, table: Table, pass_name: str, decompositions: Decompositions | None = None
) -> list[Change]:
    """Replace every node whose operator `pass_name` has in `table`; returns what was done, in the graph's order.

    decompositions: applied to what the replacements call, for a graph that has been decomposed already.
    """
    todo = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        mutates = node.target is auto_functionalized
        found = table.get(node.args[0] if mutates else node.target)
        if found is not None and found[0].pass_name == pass_name:
            entry, replacement = found
            args, kwargs = values_of(node)
            if not entry.stays(*args[mutates:], **kwargs):
                todo.append((node, entry, _functional(node.args[0], replacement) if mutates else replacement))
    if not todo:
        return []
    tracer = Tracer(fake_mode_of(graph), decompositions or {})
    changes = [splice(graph, node, entry, replacement, tracer) for node, entry, replacement in todo]
    graph.eliminate_dead_code()
    return changes


@functools.cache
def _functional(op: OpOverload, replacement: Replacement) -> Replacement:
    """The replacement of `auto_functionalized(op, …)`: what `op` returns, then what it leaves in the arguments it writes."""
    written = [a.name for a in op._schema.arguments if a.is_write]

    def run(_: OpOverload, **kwargs: Any) -> tuple[Any, ...]:
        fresh = {name: pytree.tree_map_only(Tensor, torch.clone, kwargs[name]) for name in written}
        returned = replacement(**{**kwargs, **fresh})
        returned = returned if isinstance(returned, (tuple, list)) else (returned,)
        return *returned, *fresh.values()

    return functools.wraps(replacement)(torch.func.functionalize(run))


def _signature(x: Any) -> Any:
    """What decides how a replacement is traced."""
    if isinstance(x, Tensor):
        return (
            "tensor",
            x.dtype,
            str(x.device),
            x.shape and tuple(map(str, x.shape)),
            tuple(map(str, x.stride())),
            x.requires_grad,
        )
    return (type(x).__name__, str(x))


class Tracer:
    """Traces replacements, each once for each combination of operator and argument metadata."""

    def __init__(self, mode: FakeTensorMode, decompositions: Decompositions) -> None:
        self.mode = mode
        self.decompositions = decompositions
        self.traced: dict[Any, fx.Graph] = {}

    def __call__(self, op: OpOverload, replacement: Replacement, args: Any, kwargs: Any, holes: list[int]) -> fx.Graph:
        flat, spec = pytree.tree_flatten((args, kwargs))
        key = (op, replacement, spec, tuple(map(_signature, flat)), tuple(holes))
        if key not in self.traced:
            self.traced[key] = self.trace(replacement, flat, spec, holes)
        return self.traced[key]

    def trace(self, replacement: Replacement, flat: list[Any], spec: Any, holes: list[int]) -> fx.Graph:
        def call(*leaves: Any) -> Any:
            filled = list(flat)
            for i, leaf in zip(holes, leaves, strict=True):
                filled[i] = leaf
            a, kw = pytree.tree_unflatten(filled, spec)
            return replacement(*a, **kw)

        with self.mode, torch.no_grad():
            given = _each_by_itself([flat[i] for i in holes])
            return make_fx(call, decomposition_table=self.decompositions)(*given).graph


def _each_by_itself(values: list[Any]) -> list[Any]:
    """The values, none the same object as another: a tracer takes one tensor given twice for one argument.

    What was traced is used again for other nodes, where the two arguments differ: addmm(x, x, w), then addmm(y, x, w).
    """
    before = [set(map(id, values[:i])) for i in range(len(values))]
    return [x.detach() if isinstance(x, Tensor) and id(x) in b else x for x, b in zip(values, before, strict=True)]


def splice(graph: fx.Graph, node: fx.Node, entry: Entry, replacement: Replacement, tracer: Tracer) -> Change:
    """Put `replacement`, called with the node's arguments, in the node's place."""
    flat_nodes, spec = pytree.tree_flatten((node.args, node.kwargs))
    holes = [i for i, leaf in enumerate(flat_nodes) if isinstance(leaf, fx.Node)]
    flat_values = [value_of(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in flat_nodes]
    args, kwargs = pytree.tree_unflatten(flat_values, spec)
    try:
        body = tracer(node.target, replacement, args, kwargs, holes)  # type: ignore[arg-type]
    except Exception as error:
        raise RewriteError(
            f"{_place(node, entry)}: the replacement cannot be traced on {_describe(flat_values)}: {error}"
        ) from error
    given = iter([flat_nodes[i] for i in holes])
    copies: dict[fx.Node, fx.Node] = {}
    made: list[fx.Node] = []
    result: Any = None
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(given)
            elif inner.op == "get_attr":
                raise RewriteError(
                    f"{_place(node, entry)}: the replacement {replacement.__qualname__} holds a tensor of its own, which no graph can carry: "
                    "make it with torch.full, torch.arange or torch.where"
                )
            elif inner.op == "output":
                result = fx.map_arg(inner.args[0], lambda n: copies[n])
            else:
                copies[inner] = copy = graph.node_copy(inner, lambda n: copies[n])
                copy.meta = _inherited(node, entry)
                copy.meta["val"] = _run_fake(copy, tracer.mode)
                made.append(copy)
        result = _fit(graph, node, entry, result, tracer.mode)
    _replace_uses(graph, node, result)
    return Change(
        node.name,
        _operator(node),
        entry.pass_name,
        tuple(str(n.target) for n in made if isinstance(n.target, OpOverload)),
        source_line(node),
    )


def _place(node: fx.Node, entry: Entry) -> str:
    where = source_line(node)
    return f"pass {entry.pass_name!r}, node {node.name} ({node.target}{', ' + where if where else ''})"


def _describe(values: Iterable[Any]) -> str:
    return ", ".join(f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for v in values)


def _operator(node: fx.Node) -> str:
    """The operator that the node calls; one that writes into its arguments, and was made functional, by its own name."""
    return str(node.args[0] if node.target is auto_functionalized else node.target)


def _inherited(node: fx.Node, entry: Entry) -> dict[str, Any]:
    return {**inherited(node), "bi_compile": {"replaced": _operator(node), "pass": entry.pass_name, "node": node.name}}


def _run_fake(node: fx.Node, mode: FakeTensorMode) -> Any:
    args, kwargs = values_of(node)
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fit(graph: fx.Graph, node: fx.Node, entry: Entry, result: Any, mode: FakeTensorMode) -> Any:
    """Check the replacement's outputs against the node's, and give them the node's strides where they differ."""
    want, want_spec = pytree.tree_flatten(value_of(node))
    got, _ = pytree.tree_flatten(result)
    if len(want) != len(got):
        raise RewriteError(f"{_place(node, entry)}: the operator has {len(want)} outputs, its replacement {len(got)}")
    fitted = []
    for i, (w, g) in enumerate(zip(want, got, strict=True)):
        v = value_of(g) if isinstance(g, fx.Node) else g
        if not isinstance(w, Tensor):
            fitted.append(g)
            continue
        if not isinstance(v, Tensor):
            raise RewriteError(
                f"{_place(node, entry)}: output {i} is {w.dtype}{list(w.shape)}, but the replacement gives {v!r}"
            )
        if (
            w.dtype != v.dtype
            or len(w.shape) != len(v.shape)
            or any(str(a) != str(b) and _surely_differ(a, b) for a, b in zip(w.shape, v.shape, strict=True))
        ):
            raise RewriteError(
                f"{_place(node, entry)}: output {i} is {w.dtype}{list(w.shape)}, but the replacement gives {v.dtype}{list(v.shape)}"
            )
        fitted.append(_restride(graph, node, entry, g, w, mode))
    return pytree.tree_unflatten(fitted, want_spec) if not isinstance(want, Tensor) else fitted[0]


def _surely_differ(a: Any, b: Any) -> bool:
    """Whether two sizes differ, as numbers or for the sizes that the compiler saw."""
    hints = [n if isinstance(n, int) else n.node.hint if n.node.has_hint() else None for n in (a, b)]
    return None not in hints and hints[0] != hints[1]


def stride_order(x: Tensor) -> list[int]:
    """The dimensions from the outermost to the innermost in memory."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    def outer(i: int, j: int) -> int:
        a, b = x.stride(i), x.stride(j)
        if str(a) == str(b):
            return i - j
        return 1 if guard_or_false(a < b) else -1 if guard_or_false(a > b) else i - j

    return sorted(range(x.dim()), key=functools.cmp_to_key(outer))


def _restride(graph: fx.Graph, node: fx.Node, entry: Entry, g: fx.Node, want: Tensor, mode: FakeTensorMode) -> fx.Node:
    have = value_of(g)
    sizes = [(n, a, b) for n, a, b in zip(want.shape, want.stride(), have.stride(), strict=True) if str(n) != "1"]
    if all(str(a) == str(b) for _, a, b in sizes) or not torch._prims_common.is_non_overlapping_and_dense_or_false(
        want
    ):
        return g
    order = stride_order(want)
    if order == list(range(want.dim())):
        return g
    back = [order.index(i) for i in range(want.dim())]
    for target, args in (
        (torch.ops.aten.permute.default, (order,)),
        (torch.ops.aten.clone.default, ()),
        (torch.ops.aten.permute.default, (back,)),
    ):
        kwargs: dict[str, Any] = (
            {"memory_format": torch.contiguous_format} if target is torch.ops.aten.clone.default else {}
        )
        g = graph.call_function(target, (g, *args), kwargs)
        g.meta = _inherited(node, entry)
        g.meta["val"] = _run_fake(g, mode)
    return g


def _replace_uses(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        return
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
                graph.erase_node(user)
    if node.users:
        raise RewriteError(
            f"{node.name} ({node.target}) is used as a whole by {', '.join(u.name for u in node.users)}: it has several outputs"
        )
    graph.erase_node(node)
