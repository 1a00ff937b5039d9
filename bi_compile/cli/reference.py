"""What `bi-compile passes` prints: the tables in `passes/` as a reference, and as docs/reference/operators.md."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NoReturn

from rich.markup import escape
from rich.table import Table

from ..ops import NAMESPACE, OPERATORS
from ..passes import PASSES
from ..passes import __name__ as PACKAGE
from ..table import Entry, Pass
from .console import table

_HEAD = """\
# Operators

What is replaced, by what, and why. Generated from the passes' tables by `bi-compile passes --markdown`; `make docs`
writes it anew.

An operator's `.out` and in-place forms are replaced with it and not listed. "Left alone when" names the arguments for which
the operator is exact in every order. A *pattern* is a form that an earlier stage of the compiler has
taken apart; it is found by its nodes.
"""


def called(fn: Any) -> list[str]:
    """The operators of this package that a replacement calls, read from its source; none if it only refuses."""
    found: list[str] = []
    todo, seen = [fn], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        source = inspect.getsource(current)
        found += [f"{NAMESPACE}::{name}" for name in re.findall(r"\bops\.(\w+)", source) if name in OPERATORS]
        # a replacement may lean on functions beside it, and on those of another pass
        for name in re.findall(r"(?<![\w.])(\w+)\(", source):
            called_too = current.__globals__.get(name)
            if inspect.isfunction(called_too) and called_too.__module__.startswith(PACKAGE):
                todo.append(called_too)
    return list(dict.fromkeys(found))


def by_what(entry: Entry) -> str:
    names = ", ".join(called(entry.replacement))
    if names:
        return names
    return (
        "refused"
        if entry.replacement.__annotations__.get("return") in (NoReturn, "NoReturn")
        else "row-local operators"
    )


def stays_where(entry: Entry) -> str:
    if entry.unless is None:
        return ""
    name = entry.unless.__name__
    plain = "see the pass" if name == "<lambda>" else name.strip("_").replace("_", " ")
    return (inspect.getdoc(entry.unless) or plain).splitlines()[0].rstrip(".")


def rows(p: type[Pass]) -> Iterator[tuple[list[str], str, str, str, str]]:
    """Operators of which the same is said, by what, why, stays where, source."""
    same: dict[tuple[str, str, str, str], list[str]] = {}
    for e in p.entries:
        on = f" (on {', '.join(e.targets)})" if e.targets is not None else ""
        same.setdefault((by_what(e), e.why + on, stays_where(e), e.source), []).append(e.operator)
    for said, operators in same.items():
        yield operators, *said


def patterns(p: type[Pass]) -> Iterator[tuple[str, str]]:
    """Pattern, by what; one for the forms of one name."""
    for pattern in {pattern.name: pattern for pattern in p.patterns}.values():
        yield pattern.name, ", ".join(called(pattern.replace)) or f"{NAMESPACE}::{pattern.name}"


def tables() -> Iterator[Table]:
    """For a terminal: a table for each pass."""
    for p in PASSES:
        found = table(escape(f"{p.name}: {_doc(p)}"), "operator", "replacement, reason, source", lines=True)
        for operators, *said in rows(p):
            found.add_row("\n".join(operators), escape("\n".join(_said(*said))))
        for name, by in patterns(p):
            found.add_row(f"pattern {escape(name)}", escape("\n".join(_said(by, _PATTERN, "", ""))))
        yield found


def to_json() -> list[dict[str, Any]]:
    """The passes for a program."""
    keys = ("operators", "by", "why", "unless", "source")
    return [
        {
            "pass": p.name,
            "about": _doc(p),
            "replaced": [dict(zip(keys, row, strict=True)) for row in rows(p)],
            "patterns": [{"name": name, "by": by} for name, by in patterns(p)],
        }
        for p in PASSES
    ]


_PATTERN = "as above, taken apart"


def _said(by: str, why: str, stays: str, source: str) -> list[str]:
    named = {"replaced by": by, "why": why, "left alone when": stays, "source": source}
    return [f"{name}: {' '.join(x.split())}" for name, x in named.items() if x]


def _doc(p: type[Pass]) -> str:
    return (inspect.getdoc(p) or "").split("\n\n")[0].replace("\n", " ")


def markdown() -> str:
    """docs/reference/operators.md: an entry for each group of operators of which the same is said, in lines that wrap."""
    parts = [_HEAD]
    for p in PASSES:
        parts.append(f"## {p.name}\n\n{textwrap.fill(_doc(p), _WIDTH)}\n")
        for operators, by, why, stays, source in rows(p):
            parts.append(_item(", ".join(f"`{op}`" for op in operators), _code(by), why, stays, source))
        parts += [_item(f"the pattern *{name}*", _code(by), _PATTERN, "", "") for name, by in patterns(p)]
    return "\n".join(parts)


_WIDTH = 120


def _code(names: str) -> str:
    return ", ".join(f"`{n}`" for n in names.split(", ")) if "::" in names else names


def _item(operators: str, *said: str) -> str:
    """An entry of a list: the operators, and below them what is said of them."""
    lines = [_wrapped(operators, "- ", "  "), *(_wrapped(x, "    - ", "      ") for x in _said(*said))]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
