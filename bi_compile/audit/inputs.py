"""Which dimension of which input is the batch.

Without a word from the user it is dimension 0 of every input that the program is called with: not of what a module holds
(parameters, buffers), nor of a variable that a function closes over. An input whose dimension 0 has another size than the
batch is explained, or nobody knows what the batch is:

- a size of 1 is broadcast along the batch;
- a length of the batch's inputs, as positions [L] are beside tokens [B, L], or a weight [K, N] beside rows [B, K];
- the batch times such a length, as tokens [B * L] are: the batch is the slower factor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import SymInt, Tensor, fx, nn

from ..errors import OptionError
from .layout import size_of

if TYPE_CHECKING:
    from torch._dynamo.source import Source


@dataclasses.dataclass(frozen=True)
class BatchInput:
    """An input along one dimension of which the batch runs."""

    position: int
    """Which placeholder of the graph it is."""
    name: str
    """What the program calls it."""
    dim: int = 0
    per_row: int = 1
    """How many elements of the dimension each row has; they lie together."""

    def __str__(self) -> str:
        return f"dimension {self.dim} of the input {self.name}"


@dataclasses.dataclass(frozen=True)
class _Input:
    position: int
    name: str
    placeholder: str
    value: Tensor

    @property
    def size(self) -> Any:
        return _plain(self.value.shape[0])

    @property
    def lengths(self) -> list[Any]:
        return [_plain(n) for n in self.value.shape[1:]]

    def __str__(self) -> str:
        return f"{self.name} {list(self.value.shape)}"


def batch_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], named: Mapping[str, int] | None = None
) -> tuple[BatchInput, ...]:
    """The inputs of Dynamo's graph `gm` that carry the batch.

    named: input -> its batch dimension, as the option `batch` has it; no other input carries the batch then.

    Raises:
        OptionError: `named` names none of the inputs, or a dimension that does not exist; or, without it, the sizes of the
            inputs' dimension 0 differ and do not explain each other.
    """
    inputs = _inputs(gm, example_inputs)
    if named is not None:
        return _named(inputs, named)
    return _dimension_0([i for i in inputs if i.value.dim() and not _held(gm, i.position, example_inputs)])


def placed(found: Sequence[BatchInput], graph: fx.Graph) -> tuple[BatchInput, ...]:
    """The same for the graph that AOTAutograd made of the one they were found in: its placeholders say which input each was.

    Raises:
        OptionError: an input shares its memory with another one that is changed, and came as a view of that memory.
    """
    at: dict[int, list[BatchInput]] = {}
    for i in found:
        at.setdefault(i.position, []).append(i)
    result = []
    for position, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        given = node.meta["desc"]
        while hasattr(given, "base"):  # a tensor within a subclass has the dimensions of the whole
            given = given.base
        if hasattr(given, "base_of"):
            given = given.base_of
            while hasattr(given, "base") or hasattr(given, "base_of"):
                given = getattr(given, "base", None) or given.base_of
            if at.get(getattr(given, "idx", -1)):
                raise OptionError(
                    f"the input {at[given.idx][0].name} shares its memory with another input, and one of them is changed in place: "
                    "its rows cannot be followed there; call the compiled function with a clone of it"
                )
        value = node.meta.get("val")
        result += [
            dataclasses.replace(i, position=position)
            for i in at.get(getattr(given, "idx", -1), ())
            if isinstance(value, Tensor) and i.dim < value.dim()
        ]
    return tuple(result)


def input_names(gm: fx.GraphModule) -> list[str]:
    """What the program calls each input of Dynamo's graph: `x`, and `layers.0.weight` for what a module holds."""
    names = (_name(n) for n in gm.graph.nodes if n.op == "placeholder")
    return [re.sub(r"^self\.|(?<=\.)_(?:parameters|buffers|modules)\.", "", _HELD.sub(r".\1", n)) for n in names]


#: `._modules['a']`, `._parameters['weight']`, and `['a']`
_HELD = re.compile(r"(?:\._(?:modules|parameters|buffers))?\['(\w+)'\]")


def name_inputs(graph: fx.Graph, names: Sequence[str]) -> list[str]:
    """Note in `meta["bi_compile_input"]` what the program calls each input, and give these names in order.

    names: those of the graph that AOTAutograd made this one of.
    """
    found = []
    for node in graph.nodes:
        if node.op == "placeholder":
            position = getattr(node.meta.get("desc"), "idx", -1)
            found.append(names[position] if 0 <= position < len(names) else "")
            if found[-1]:
                node.meta["bi_compile_input"] = found[-1]
    return found


def _inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[_Input]:
    found = []
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for position, (node, example) in enumerate(zip(nodes, example_inputs, strict=True)):
        value = node.meta.get("example_value", example)
        if isinstance(value, Tensor):
            found.append(_Input(position, _name(node), node.name, value))
    return found


def _source(node: fx.Node) -> Source | None:
    argument = node.meta.get("grapharg")
    return getattr(node, "_dynamo_source", None) or getattr(argument, "source", None)


def _root(source: Source) -> Any:
    """The variable that `source` starts from: `L['x']` of `L['x'].y[0]`."""
    # here: it imports the whole of Dynamo, which made the graph that we read
    from torch._dynamo.source import ChainedSource

    root: Any = source
    while isinstance(root, ChainedSource):
        root = root.base
    return root


def _name(node: fx.Node) -> str:
    """`x` for L['x'], and `input_ids` for what `**kwargs` brings under that name."""
    source = _source(node)
    if source is None:
        return node.name
    name: str = source.name() if callable(source.name) else source.name  # a method before torch 2.11
    if getattr(_root(source), "is_varkw", False):
        name = re.sub(r"^L\['\w+'\]", "L", name)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", name)


def _held(gm: fx.GraphModule, position: int, example_inputs: Sequence[Any]) -> bool:
    """Whether a module, a global variable or a closure holds it: it is no input of the call."""
    node = [n for n in gm.graph.nodes if n.op == "placeholder"][position]
    source = _source(node)
    if isinstance(example_inputs[position], nn.Parameter):
        return True
    if source is None:
        return False
    from torch._dynamo.source import GlobalSource, LocalSource

    guard, root = source.guard_source, _root(source)
    return (
        guard.is_unspecialized_nn_module()
        or guard.is_specialized_nn_module()
        or guard.is_fsdp_module()
        or isinstance(root, GlobalSource)
        or (isinstance(root, LocalSource) and root.is_derefed_cell_contents)
    )


def _named(inputs: Sequence[_Input], named: Mapping[str, int]) -> tuple[BatchInput, ...]:
    found = []
    for i in inputs:
        for name in {i.name, i.placeholder} & set(named):
            dim, rank = named[name], i.value.dim()
            if not -rank <= dim < rank:
                raise OptionError(f"batch={{{name!r}: {dim}}}: the input {i} has no dimension {dim}")
            found.append(BatchInput(i.position, i.name, dim % rank))
    if named and not found:
        raise OptionError(
            f"batch={dict(named)!r}: the graph has none of these inputs; it has {', '.join(map(str, inputs)) or 'none'}"
            " (each graph that a graph break leaves has inputs of its own: name one of each)"
        )
    return tuple(found)


def _dimension_0(inputs: Sequence[_Input]) -> tuple[BatchInput, ...]:
    groups: dict[Any, list[_Input]] = {}
    # inputs of one size may have symbols of their own where nothing in the program compares them
    of_size: dict[int, Any] = {}
    for i in inputs:
        size = i.size if isinstance(i.size, int) else of_size.setdefault(_hint(i), i.size)
        groups.setdefault(size, []).append(i)
    size = _batch_size(groups)
    if size is None or size == 1:  # a batch of one has no rows to mix
        return ()
    found = []
    for n, group in groups.items():
        if n == size or (n != 1 and not _is_length(group, groups[size]) and _is_merged(n, size, groups[size])):
            found += [
                BatchInput(i.position, i.name, per_row=1 if n == size else _hint(i) // _hint(groups[size][0]))
                for i in group
            ]
    return tuple(sorted(found, key=lambda i: i.position))


def _batch_size(groups: Mapping[Any, Sequence[_Input]]) -> Any:
    """The size that explains all others; None where there is no input. Raises OptionError: it is not known."""
    if len(groups) < 2:
        return next(iter(groups), None)

    def explains(a: Any, b: Any) -> bool:
        return b == 1 or _is_length(groups[b], groups[a]) or _is_merged(b, a, groups[a])

    possible = [a for a in groups if all(explains(a, b) for b in groups if b != a)]
    if not possible:  # a size that has changed, beside others that have not
        possible = [a for a in groups if not isinstance(a, int)]
    # positions [L] beside one sequence [1, L], or tokens beside a mask [1, L]: what has more dimensions knows the batch
    rank = max((i.value.dim() for a in possible for i in groups[a]), default=0)
    deepest = [a for a in possible if any(i.value.dim() == rank for i in groups[a])]
    if len(deepest) > 1 and 1 in deepest:
        return 1
    if len(deepest) == 1:
        return deepest[0]
    names = ", ".join(str(i) for group in groups.values() for i in group)
    first = next(iter(groups.values()))[0].name
    raise OptionError(
        f"the batch is dimension 0 of every input that is not a parameter or a buffer, and its size differs: {names}; name the "
        f"inputs that carry the batch and its dimension, as in batch={{{first!r}: 0}}"
    )


def _is_length(some: Sequence[_Input], batch: Sequence[_Input]) -> bool:
    """Whether the dimension 0 of each of `some` is a later dimension of an input of the batch, which has more of them."""
    return all(
        any(i.size in b.lengths and (i.value.dim() < b.value.dim() or i.value.dim() <= 2) for b in batch) for i in some
    )


def _is_merged(n: Any, size: Any, batch: Sequence[_Input]) -> bool:
    """Whether `n` is the batch times a later dimension of an input of the batch."""
    return any(length != 1 and n == size * length for b in batch for length in b.lengths)


def _plain(n: Any) -> Any:
    """A size as an int or as the compiler's expression."""
    return n.node.expr if isinstance(n, SymInt) and n.node.expr.free_symbols else int(n)


def _hint(i: _Input) -> int:
    return size_of(i.value.shape[0]) or 1
