"""The norms of a token's queries and keys, which lie in one row of a product, as one operator: a launch less for each layer."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops import OPERATORS
from ..user_code import inherited

_VIEWS = {
    torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.slice.Tensor,
    torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim, torch.ops.aten.alias.default,
}  # fmt: skip
_SPLITS = {
    torch.ops.aten.split_with_sizes.default, torch.ops.aten.split.Tensor, torch.ops.aten.chunk.default, torch.ops.aten.unbind.int,
}  # fmt: skip


def join_norms(graph: fx.Graph) -> int:
    """Have each pair of `bi_compile::rms_norm` of neighbouring heads of one row [T, C] computed by `bi_compile::qk_norm`, with the same bits.

    Returns how many pairs were joined. Norms of another layout, of weights of two dtypes, or whose rstd is used stay.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    heads: dict[Any, list[Any]] = defaultdict(list)
    node: Any
    for node in graph.nodes:
        if node.target is OPERATORS["rms_norm"] and _fits(node):
            x, weight, eps = node.args
            heads[_base(x), x.meta["val"].shape[2], weight.meta["val"].dtype, eps].append(node)
    joined = 0
    for (base, size, _, _), nodes in heads.items():
        for q, k in itertools.pairwise(sorted(nodes, key=_offset)):
            if _offset(q) == 0 and _offset(k) == _heads(q) * size and _join(graph, base, q, k, order):
                joined += 1
    return joined


def _fits(node: Any) -> bool:
    x, weight, _ = node.args
    bare = all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)
    if not bare or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return False
    base, value = _base(x).meta.get("val"), x.meta.get("val")
    return (
        isinstance(base, FakeTensor)
        and isinstance(value, Tensor)
        and base.dim() == 2
        and value.dim() == 3
        and base.stride() == (base.shape[1], 1)
        and base.storage_offset() == 0
        and statically_known_true(value.shape[0] == base.shape[0])
        and value.stride() == (base.shape[1], value.shape[2], 1)
    )


def _base(node: Any) -> fx.Node:
    """What a view of a tensor, or of a part of it, is a view of."""
    while True:
        if node.target is operator.getitem and node.args[0].target in _SPLITS:
            node = node.args[0].args[0]
        elif node.target in _VIEWS:
            node = node.args[0]
        else:
            return node


def _offset(node: Any) -> int:
    return int(node.args[0].meta["val"].storage_offset())


def _heads(node: Any) -> int:
    return int(node.args[0].meta["val"].shape[1])


def _join(graph: fx.Graph, base: fx.Node, q: Any, k: Any, order: dict[fx.Node, int]) -> bool:
    """Put `qk_norm` where the first of the two stands, if the other's weight can be known there."""
    first, last = sorted((q, k), key=order.__getitem__)
    between = itertools.takewhile(
        lambda node: node is not last, itertools.dropwhile(lambda node: node is not first, graph.nodes)
    )
    if any(_writes(node) for node in between) or not _move_before(first, last.args[1], order):
        return False
    args = (base, q.args[1], k.args[1], _heads(q), _heads(k), q.args[2])
    with graph.inserting_before(first):
        both = graph.call_function(OPERATORS["qk_norm"], args)
        with base.meta["val"].fake_mode:
            both.meta = {**inherited(first), "val": OPERATORS["qk_norm"](*fx.map_arg(args, lambda n: n.meta["val"]))}
        parts = [graph.call_function(operator.getitem, (both, i)) for i in range(2)]
    for part, i, norm in zip(parts, range(2), (q, k), strict=True):
        part.meta = {**inherited(norm), "val": both.meta["val"][i]}
        for user in list(norm.users):
            user.replace_all_uses_with(part)
            graph.erase_node(user)
        graph.erase_node(norm)
    return True


def _writes(node: fx.Node) -> bool:
    """Whether a node may write into one of its arguments."""
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _move_before(first: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Have `node` stand before `first`, where that takes no more than moving views."""
    if order[node] < order[first]:
        return True
    source = node.args[0] if node.target in _VIEWS else None
    if not isinstance(source, fx.Node) or not _move_before(first, source, order):
        return False
    first.prepend(node)
    return True
