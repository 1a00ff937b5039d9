"""The table: which operator is replaced by which function, and why.

    class Softmax(Pass):
        name = "softmax"
        why = "the row sum's split follows the number of rows"
        source = "aten/src/ATen/native/cuda/SoftMax.cu"


    @Softmax.replaces(aten._softmax.default)
    def softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
        return ops.softmax(self, dim, dtype=torch.float32 if half_to_float else None)

A replacement is written as PyTorch writes a decomposition: a function with the signature of the operator, made of invariant
operators only. The same table serves the compiler (`rewrite`), the dispatcher (`eager`), the `audit` and the reference page.

A functional operator's `.out` overload and in-place form need no entry of their own: they are derived from the entry of
the functional one (`Entry.overloads`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch._ops import OpOverload
from torch._prims_common.wrappers import _maybe_resize_out, _safe_copy_out

from .errors import TableError

Replacement = Callable[..., Any]
F = TypeVar("F", bound=Replacement)


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
    """The pass that holds it."""

    @property
    def op(self) -> OpOverload | None:
        return find_operator(self.operator)

    def stays(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the operator is exact for these arguments, and is left as it is."""
        if self.unless is None:
            return False
        if not kwargs:  # asked at every call of eager code
            return self.unless(*args)
        names = _argument_names(self.operator)
        # an overload that says where the result goes asks by the arguments that it has in common with the operator
        return self.unless(*args, **{k: v for k, v in kwargs.items() if not names or k in names})

    def overloads(self) -> Iterator[tuple[OpOverload, Replacement]]:
        """The operator with its replacement, and the overloads that only say where the result goes (`.out`, in place)."""
        op = self.op
        if op is None:
            return
        _check_signature(op, self)
        yield op, self.replacement
        for sibling, outs in _siblings(op):
            yield sibling, _into_out(self.replacement, outs) if outs else _into_self(self.replacement)


@functools.cache
def _argument_names(operator: str) -> frozenset[str]:
    """Empty where nobody has registered the operator."""
    op = find_operator(operator)
    return frozenset() if op is None else frozenset(a.name for a in op._schema.arguments)


@functools.cache
def _siblings(op: OpOverload) -> list[tuple[OpOverload, list[str]]]:
    """The overloads of `op` with the same arguments that write the result, each with those it writes to; none for in place."""
    arguments = [(a.name, str(a.type)) for a in op._schema.arguments]
    ns, _, packet = op._schema.name.partition("::")
    found = []
    for name, in_place in ((packet, False), (packet + "_", True)):
        sibling_packet = getattr(getattr(torch.ops, ns), name, None)
        for overload in sibling_packet.overloads() if sibling_packet is not None else ():
            sibling = getattr(sibling_packet, overload)
            if sibling == op or not sibling._schema.is_mutable:
                continue
            outs = [a.name for a in sibling._schema.arguments if a.is_out]
            same = [(a.name, str(a.type)) for a in sibling._schema.arguments if not a.is_out]
            if same == arguments and bool(outs) is not in_place:
                found.append((sibling, outs))
    return found


def _into_out(replacement: Replacement, outs: list[str]) -> Replacement:
    """`op.out`: resized as PyTorch's own out= does, then written."""

    @functools.wraps(replacement)
    def run(*args: Any, **kwargs: Any) -> Any:
        into = [kwargs.pop(name) for name in outs]
        results = replacement(*args, **kwargs)
        for out, result in zip(into, [results] if isinstance(results, torch.Tensor) else results, strict=True):
            _safe_copy_out(copy_from=result, copy_to=_maybe_resize_out(out, result.shape))
        return into[0] if len(into) == 1 else tuple(into)

    return run


def _into_self(replacement: Replacement) -> Replacement:
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


def given(arguments: Mapping[str, Any], plain: Mapping[str, Any] | None = None) -> list[str]:
    """The names of the arguments that ask for something: not None, and not the default.

    plain: the defaults; that of an argument which is not among them is 0, False or empty.
    """

    def is_default(name: str, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return False
        return value is None or (value == plain[name] if plain and name in plain else not value)

    return [name for name, value in arguments.items() if not is_default(name, value)]


def refuse(operator: str, arguments: Iterable[str], remedy: str) -> NoReturn:
    """Stop where a replacement has no invariant form for `arguments`; `remedy` says what to do instead.

    The compiler adds the pass, the node and the line of the user's program.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f"{operator} with {', '.join(arguments)} has no invariant form: {remedy}")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Nodes that an earlier stage has taken apart, and the function that puts an operator in their place.

    `search` and `replace` take the same arguments; `search` is written plainly, and is traced to the form that is looked
    for. `examples` makes its example arguments (fake mode is on); of these the dtypes of casts alone are looked for in a graph.
    `fits` is asked about the arguments that were found, as fake values: the pattern is left alone where it says no.
    """

    name: str
    search: Callable[..., Any]
    replace: Callable[..., Any]
    examples: Callable[[], list[Any]]
    scalars: dict[str, float]
    """Arguments that are numbers in the graph, each with a value of its own."""
    fits: Callable[..., bool] | None = None


class Pass:
    """Base of a pass: a subclass is a named list of replacements. It is not instantiated.

    Attributes:
        name: what `custom_passes` and `passes` call it.
        why: what makes its operators vary with the batch; an entry may give a reason of its own.
        source: where that is known from; an entry may give a source of its own.
        patterns: forms that an earlier stage has taken apart.
        entries: one for each operator, in the order of their definition; filled by `replaces`.
    """

    name: ClassVar[str]
    why: ClassVar[str] = ""
    source: ClassVar[str] = ""
    patterns: ClassVar[tuple[Pattern, ...]] = ()
    entries: ClassVar[tuple[Entry, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "name", None), str):
            raise TableError(f'the pass {cls.__qualname__} has no name: give it `name = "..."`')
        if hasattr(cls, "groups"):
            raise TableError(
                f"the pass {cls.name!r} lists groups: write `patterns = (bi_compile.Pattern(...), ...)` instead"
            )
        cls.entries = ()
        for attribute in list(vars(cls).values()):
            for operators, said in getattr(attribute, "_bi_replaces", ()):
                cls.replaces(*operators, **said)(attribute)

    @classmethod
    def replaces(
        cls,
        *operators: str | OpOverload,
        why: str | None = None,
        source: str | None = None,
        unless: Callable[..., bool] | None = None,
        targets: Iterable[str] | None = None,
        eager: bool = True,
    ) -> Callable[[F], F]:
        """Make the function below the replacement of `operators` (overloads, or their names `ns.packet.overload`).

        Args:
            why: why these operators vary, where that differs from the pass's own.
            source: where that is known from, where it differs from the pass's own.
            unless: a predicate of the operator's arguments; where it is true the operator is exact and stays as it is.
            targets: the targets on which the operator varies (default: all).
            eager: whether the eager fallback takes the operator too.

        Raises:
            TableError: neither the pass nor the entry says why, or from where that is known.
        """
        why, source = why or cls.why, source or cls.source
        for key, value in (("why", why), ("source", source)):
            if not value:
                raise TableError(
                    f'the pass {cls.name!r} gives no {key} for {", ".join(map(str, operators))}: set `{key} = "..."` in the pass'
                )
        on = tuple(targets) if targets is not None else None

        def add(fn: F) -> F:
            cls.entries += tuple(Entry(str(op), fn, why, source, unless, on, eager, cls.name) for op in operators)
            return fn

        return add


def replaces(*operators: str | OpOverload, **said: Any) -> Callable[[F], F]:
    """`Pass.replaces` for a function in the body of the pass's class; it takes the operator's arguments and no `self` of the class."""

    def mark(fn: F) -> F:
        fn._bi_replaces = [*getattr(fn, "_bi_replaces", ()), (operators, said)]  # type: ignore[attr-defined]
        return fn

    return mark


class Table:
    """The entries of several passes for one target, by overload.

    Raises:
        TableError: two passes replace one operator, or a replacement's signature does not fit its operator.
    """

    def __init__(self, passes: Iterable[type[Pass]], target: str) -> None:
        self.by_overload: dict[OpOverload, tuple[Entry, Replacement]] = {}
        entries = [e for p in passes for e in p.entries if e.targets is None or target in e.targets]
        named = {(e.pass_name, e.op) for e in entries}
        for entry in entries:
            for op, replacement in entry.overloads():
                if op != entry.op and (entry.pass_name, op) in named:
                    continue  # a form in place that its pass replaces by a function of its own
                other = self.by_overload.get(op)
                if other is not None:
                    raise TableError(
                        f"the passes {other[0].pass_name!r} and {entry.pass_name!r} both replace {op}: "
                        "leave one of them out of custom_passes"
                    )
                self.by_overload[op] = entry, replacement

    def get(self, op: Any) -> tuple[Entry, Replacement] | None:
        return self.by_overload.get(op) if isinstance(op, OpOverload) else None
