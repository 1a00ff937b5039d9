"""The table: which operator is replaced by which function, and why.

    class Softmax(Pass):
        name = "softmax"

        @replaces(aten._softmax.default, why="...", source="...")
        def softmax(x, dim, half_to_float):
            return ops.softmax(...)

A pass is a class that holds replacements: plain functions (no self) with the signature of the operator they replace, written
with invariant operators only. The same table serves the compiler (`rewrite`), the dispatcher (`eager`), the `audit` and the
reference page.

A functional operator's `.out` overload and in-place form need no entry of their own: they are derived from the entry of
the functional one (`Entry.overloads`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload

from .errors import TableError

Replacement = Callable[..., Any]


def find_operator(name: str) -> OpOverload | None:
    """The overload called `ns.packet.overload` (as `str(op)` prints it), or None where nobody registered it."""
    ns, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, ns), packet), overload)
    except AttributeError:
        return None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table."""

    operator: str
    """`ns.packet.overload`; an operator of a library that is not installed may stand here and is passed over."""
    replacement: Replacement
    why: str
    source: str
    unless: Callable[..., bool] | None
    """Called with the operator's arguments (fake or real): where it is true the operator is exact, and stays."""
    targets: tuple[str, ...] | None
    """The targets on which the operator varies; None: on all."""
    eager: bool = True
    """Whether the eager fallback takes the operator too."""
    pass_name: str = ""

    @property
    def op(self) -> OpOverload | None:
        return find_operator(self.operator)

    def stays(self, *args: Any, **kwargs: Any) -> bool:
        return self.unless is not None and self.unless(*args, **kwargs)

    def overloads(self) -> Iterator[tuple[OpOverload, Replacement]]:
        """The operator with its replacement, and the overloads that only say where the result goes (`.out`, in place)."""
        op = self.op
        if op is None:
            return
        _check_signature(op, self)
        yield op, self.replacement
        arguments = [(a.name, str(a.type)) for a in op._schema.arguments]
        ns, packet, _ = self.operator.split(".")
        namespace = getattr(torch.ops, ns)
        for sibling_packet, into in ((packet, _into_out), (packet + "_", _into_self)):
            for name in getattr(namespace, sibling_packet).overloads() if hasattr(namespace, sibling_packet) else ():
                sibling = getattr(getattr(namespace, sibling_packet), name)
                if sibling == op or not sibling._schema.is_mutable:
                    continue
                outs = [a.name for a in sibling._schema.arguments if a.is_out]
                same = [(a.name, str(a.type)) for a in sibling._schema.arguments if not a.is_out]
                if same == arguments and (outs or into is _into_self):
                    yield sibling, into(self.replacement, outs)


def _into_out(replacement: Replacement, outs: list[str]) -> Replacement:
    """`op.out`: resized as PyTorch's own out= does, then written."""

    @functools.wraps(replacement)
    def run(*args: Any, **kwargs: Any) -> Any:
        from torch._prims_common.wrappers import _maybe_resize_out, _safe_copy_out

        into = [kwargs.pop(name) for name in outs]
        results = replacement(*args, **kwargs)
        for out, result in zip(into, [results] if isinstance(results, torch.Tensor) else results, strict=True):
            _safe_copy_out(copy_from=result, copy_to=_maybe_resize_out(out, result.shape))
        return into[0] if len(into) == 1 else tuple(into)

    return run


def _into_self(replacement: Replacement, outs: list[str]) -> Replacement:
    """`op_`: written into the first argument."""

    @functools.wraps(replacement)
    def run(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.copy_(replacement(self, *args, **kwargs))

    return run


def _check_signature(op: OpOverload, entry: Entry) -> None:
    schema = op._schema.arguments
    positional = [a.name for a in schema if not a.kwarg_only]
    parameters = list(inspect.signature(entry.replacement).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    mine = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    missing = [a.name for a in schema if a.kwarg_only and a.name not in by_name and not anything]
    if len(mine) != len(positional) or missing:
        raise TableError(
            f"the replacement {entry.replacement.__qualname__} of {entry.operator} in the pass {entry.pass_name!r} has the "
            f"signature {inspect.signature(entry.replacement)}, which does not fit {op._schema}: give it the operator's arguments"
        )


def replaces(
    *operators: str | OpOverload,
    why: str,
    source: str,
    unless: Callable[..., bool] | None = None,
    targets: Iterable[str] | None = None,
    eager: bool = True,
) -> Callable[[Replacement], Replacement]:
    """Mark a function of a `Pass` as the replacement of `operators` (overloads, or their names `ns.packet.overload`).

    Args:
        why: what makes the operator vary with the batch.
        source: where that is known from.
        unless: a predicate of the operator's arguments; where it is true the operator is exact and stays as it is.
        targets: the targets on which the operator varies (default: all).
        eager: whether the eager fallback takes the operator too.
    """

    def mark(fn: Replacement) -> Replacement:
        on = tuple(targets) if targets is not None else None
        entries = [Entry(str(op), fn, why, source, unless, on, eager) for op in operators]
        fn._bi_entries = [*getattr(fn, "_bi_entries", []), *entries]  # type: ignore[attr-defined]
        return fn

    return mark


def given(arguments: Mapping[str, Any], plain: Mapping[str, Any] | None = None) -> list[str]:
    """The arguments that say something: not None, not the default that `plain` names, or where it names none not 0, False or
    empty. For a refusal by name."""

    def says_nothing(name: str, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return False
        return value is None or (value == plain[name] if plain and name in plain else not value)

    return [name for name, value in arguments.items() if not says_nothing(name, value)]


@dataclasses.dataclass(frozen=True)
class Group:
    """Nodes that an earlier stage has taken apart, and the function that puts an operator in their place.

    `search` and `replace` take the same arguments; `search` is written plainly, and is traced to the form that is looked
    for. `examples` makes its example arguments (fake mode is on).
    """

    name: str
    search: Callable[..., Any]
    replace: Callable[..., Any]
    examples: Callable[[], list[Any]]
    scalars: dict[str, float]
    """Arguments that are numbers in the graph, each with a value of its own."""


class Pass:
    """Base of a pass. Subclasses set `name`, mark functions with `@replaces`, and may list `groups`."""

    name: ClassVar[str]
    entries: ClassVar[tuple[Entry, ...]] = ()
    groups: ClassVar[tuple[Group, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "name", None), str):
            raise TableError(f'the pass {cls.__qualname__} has no name: give it `name = "..."`')
        found: list[Entry] = []
        for attribute in vars(cls).values():
            # a list holds functions that were made from a list of names
            for fn in attribute if isinstance(attribute, list) else [attribute]:
                found += [dataclasses.replace(e, pass_name=cls.name) for e in getattr(fn, "_bi_entries", ())]
        cls.entries = tuple(found)


class Table:
    """The entries of several passes for one target, by overload.

    Raises:
        TableError: two passes replace one operator, or a replacement's signature does not fit its operator.
    """

    def __init__(self, passes: Iterable[type[Pass]], target: str) -> None:
        self.by_overload: dict[OpOverload, tuple[Entry, Replacement]] = {}
        for entry in (e for p in passes for e in p.entries if e.targets is None or target in e.targets):
            for op, replacement in entry.overloads():
                other = self.by_overload.get(op)
                if other is not None:
                    raise TableError(
                        f"the passes {other[0].pass_name!r} and {entry.pass_name!r} both replace {op}: "
                        "leave one of them out of custom_passes"
                    )
                self.by_overload[op] = entry, replacement

    def get(self, op: Any) -> tuple[Entry, Replacement] | None:
        return self.by_overload.get(op) if isinstance(op, OpOverload) else None
