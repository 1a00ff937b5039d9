"""What rewriter and audit ask of a node: its source line, its fake values, its operator, the graphs that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import RewriteError
from ..user_code import is_of_the_model


def source_line(node: fx.Node) -> str:
    """File and line of the user's program that the node came from; the empty string where it is not known.

    It is the innermost frame in a file of the model (`is_of_the_model`), or the innermost of all where there is none.
    """
    innermost = ""
    for line in reversed((node.meta.get("stack_trace") or "").splitlines()):
        if line.lstrip().startswith("File "):
            found = line.strip().removeprefix("File ").replace('"', "")
            if is_of_the_model(found.partition(", line ")[0]):
                return found
            innermost = innermost or found
    return innermost


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of the graph's values.

    Raises:
        RewriteError: no node carries a fake value.
    """
    for node in graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch._subclasses.FakeTensor):
                return leaf.fake_mode
    raise RewriteError(
        "the graph carries no shape information (no node has a fake tensor in meta['val']): run the pass where "
        "torch.compile has traced shapes, or run torch.fx.passes.fake_tensor_prop.FakeTensorProp over the graph first"
    )


def value_of(node: fx.Node) -> Any:
    """The node's fake value. Raises RewriteError: it has none."""
    if "val" not in node.meta:
        raise RewriteError(
            f"the node {node.name} ({node.target}) carries no shape information (meta['val'] is missing), so it cannot be "
            "rewritten: run torch.fx.passes.fake_tensor_prop.FakeTensorProp over the graph after the pass that made it"
        )
    return node.meta["val"]


def values_of(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with each node in them replaced by its fake value."""
    return fx.map_arg((node.args, node.kwargs), value_of)


def packet_of(node: fx.Node) -> str:
    """The operator's name without namespace and overload; empty for what is no operator."""
    return node.target._overloadpacket.__name__ if isinstance(node.target, OpOverload) else ""


def has_tensor(node: fx.Node) -> bool:
    """Whether one of the node's results is a tensor."""
    return any(isinstance(v, Tensor) for v in as_list(node.meta.get("val")))


# -- higher-order operators -----------------------------------------------------------------------------------------


def as_list(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (tuple, list)) else [x]


def _scanned(scan: fx.Node) -> list[tuple[Any, list[Any], list[Any]]]:
    body, init, xs, more = (*scan.args, ())[:4]
    return [(body, [*as_list(init), *as_list(xs), *as_list(more)], as_list(xs))]


#: operator -> for each graph that it holds: the graph, its operands, and those of which it gets one slice of dimension 0
SUBGRAPHS: dict[str, Callable[[fx.Node], list[tuple[Any, list[Any], list[Any]]]]] = {
    "cond": lambda n: [(body, as_list(n.args[3]), []) for body in n.args[1:3]],
    # the body first: what it hands back is what the condition sees
    "while_loop": lambda n: [(body, [*as_list(n.args[2]), *as_list(n.args[3])], []) for body in n.args[1::-1]],
    "invoke_subgraph": lambda n: [(n.args[0], list(n.args[2:]), [])],
    "map_impl": lambda n: [(n.args[0], [*as_list(n.args[1]), *as_list(n.args[2])], as_list(n.args[1]))],
    "scan": _scanned,
}


def subgraphs(node: fx.Node) -> list[tuple[str, fx.GraphModule, list[Any], list[Any]]]:
    """The graphs that a higher-order operator holds: name, graph, operands, those it gets a slice of. None: unreadable."""
    find = SUBGRAPHS.get(node.target.name()) if isinstance(node.target, HigherOrderOperator) else None
    owner = node.graph.owning_module
    found = []
    for body, operands, sliced in find(node) if find and node.args and owner is not None else ():
        graph = getattr(owner, str(body.target), None) if isinstance(body, fx.Node) and body.op == "get_attr" else None
        if not isinstance(graph, fx.GraphModule):
            return []
        found.append((str(body.target), graph, operands, sliced))
    return found


def held_graphs(graph: fx.Graph) -> Iterator[fx.GraphModule]:
    """The graphs that the higher-order operators of `graph` hold, and that those hold, each once."""
    found: dict[int, fx.GraphModule] = {}
    todo = [graph]
    while todo:
        for node in todo.pop().nodes:
            for _, body, _, _ in subgraphs(node):
                if id(body) not in found:
                    found[id(body)] = body
                    todo.append(body.graph)
    yield from found.values()
