"""A node as the rules of `batch_rules` see it, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from ..rewrite.fx_utils import as_list, packet_of
from .layout import Layout, size_of

#: a node that is combined, the dimension along which
Combined = tuple[fx.Node, int]


class Node:
    """A node as the rules see it."""

    def __init__(self, node: fx.Node, layouts: Mapping[fx.Node, Any]) -> None:
        self.node = node
        self.layouts = layouts
        self.value: Any = node.meta.get("val")
        self.packet = packet_of(node)

    def arg(self, name: str, default: Any = None) -> Any:
        for i, a in enumerate(self.node.target._schema.arguments):  # type: ignore[union-attr]
            if a.name == name:
                return self.node.args[i] if i < len(self.node.args) else self.node.kwargs.get(name, a.default_value)
        return default

    def layout(self, x: Any) -> Layout:
        """The layout of an argument; empty for what is no tensor."""
        return (self.layouts.get(x) or ()) if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor) else ()

    @property
    def tensors(self) -> list[fx.Node]:
        return [a for a in self.node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]

    @property
    def first(self) -> fx.Node:
        return self.tensors[0]

    @property
    def shape(self) -> list[int]:
        """The size of the (first) result."""
        value = next(v for v in as_list(self.value) if isinstance(v, Tensor))
        return [size_of(n) for n in value.shape]


#: the layout of the result, or one for each output; and what is combined
Result = tuple[Any, Sequence[Combined]]
Rule = Callable[[Node], Result]
