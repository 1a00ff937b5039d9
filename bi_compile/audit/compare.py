"""What differs between two certificates: settings, then inputs, nodes and outputs.

Names of nodes and symbols carry numbers that shift with every node in front of them (one more input renames all that follow). So
difflib aligns the nodes by what they are: kind, operator, value and arguments, without names and symbols. What is aligned then gives
the names and symbols of one certificate in terms of the other's, and only what still differs is a difference.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Node = Mapping[str, Any]
_SYMBOL = re.compile(r"\b[su]\d+\b")
_WORD = re.compile(r"[A-Za-z_]\w*")


class Difference(NamedTuple):
    """One thing in which two certificates differ; an empty string where one of them lacks it."""

    what: str
    a: str
    b: str


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Everything in which two certificates differ, settings first, then the inputs, the other nodes, the outputs."""
    found = [Difference(key, str(a[key]), str(b[key])) for key in ("target", "batch") if a[key] != b[key]]
    found += _items("version of", a["versions"], b["versions"])
    if a["source"] != b["source"] and a["versions"].get("bi-compile") == b["versions"].get("bi-compile"):
        found.append(Difference("source of bi_compile", a["source"][:16], b["source"][:16]))
    uuids = [{p["name"]: p["uuid"][:16] for p in x["passes"]} for x in (a, b)]
    found += _items("pass", *uuids)
    order = [[name for name in x if name in uuids[0].keys() & uuids[1].keys()] for x in uuids]
    if order[0] != order[1]:
        found.append(Difference("order of the passes", ", ".join(order[0]), ", ".join(order[1])))
    found += _items("trust in", a["trust"], b["trust"])
    rank = {"input": 0, "constant": 1, "node": 2, "output": 3}
    return found + sorted(_nodes(a["nodes"], b["nodes"]), key=lambda d: rank[d.what.partition(" ")[0].rstrip(":")])


def _items(what: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            yield Difference(f"{what} {name}", a.get(name, ""), b.get(name, ""))


def kind(node: Node) -> str:
    """`input`, `constant`, `output` or `node`, by the reason of the verdict."""
    return {"an input": "input", "a constant": "constant", "the output": "output"}.get(node["reason"], "node")


def _nodes(a: Sequence[Node], b: Sequence[Node]) -> Iterator[Difference]:
    pairs = _aligned(a, b)
    known = {n["node"].rpartition("/")[2] for n in (*a, *b)}
    names: dict[str, str] = {}
    for x, y in pairs:
        if x is not None and y is not None:
            names.setdefault(y["node"].rpartition("/")[2], x["node"].rpartition("/")[2])
            for theirs, ours in zip(_SYMBOL.findall(y["value"]), _SYMBOL.findall(x["value"]), strict=False):
                names.setdefault(theirs, ours)
            known.update(_SYMBOL.findall(x["value"]), _SYMBOL.findall(y["value"]))
        elif y is not None:  # no node of a's, though one of them may have its name
            name = y["node"].rpartition("/")[2]
            names.setdefault(name, f"{name} of the other")

    def translated(thing: Any) -> Any:
        """What b says, in a's names."""
        if isinstance(thing, str):
            return _WORD.sub(lambda m: names.get(m[0], m[0]) if m[0] in known else m[0], thing)
        return {translated(k): v for k, v in thing.items()} if isinstance(thing, Mapping) else thing

    for x, y in pairs:
        if x is None or y is None:
            (n,) = (n for n in (x, y) if n is not None)
            text = f"{n['operator']} {n['value']}".removeprefix(f"{n['node']} ")
            yield Difference(_label(n), *("" if m is None else text for m in (x, y)))
            continue
        for key in ("operator", "verdict", "reason", "where", "rows_in", "rows_out", "value", "arguments"):
            if kind(x) == kind(y) != "node" and key == "operator":
                continue  # an input's is its name
            if x[key] != translated(y[key]):
                yield Difference(f"{_label(x)}: {key}", str(x[key]), str(y[key]))


def _label(node: Node) -> str:
    return "output" if kind(node) == "output" and "/" not in node["node"] else f"{kind(node)} {node['node']}"


def _aligned(a: Sequence[Node], b: Sequence[Node]) -> list[tuple[Node | None, Node | None]]:
    """The nodes in pairs; None where one side has nothing like it."""
    exact, operators = _keys(a, b)
    found: list[tuple[Node | None, Node | None]] = []
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, *exact, autojunk=False).get_opcodes():
        if tag == "equal":
            found += zip(a[i:i_end], b[j:j_end], strict=True)
            continue
        left, right = operators[0][i:i_end], operators[1][j:j_end]
        for inner, k, k_end, m, m_end in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
            if inner == "equal":
                found += zip(a[i + k : i + k_end], b[j + m : j + m_end], strict=True)
            else:
                found += [(n, None) for n in a[i + k : i + k_end]]
                found += [(None, n) for n in b[j + m : j + m_end]]
    return found


def _keys(a: Sequence[Node], b: Sequence[Node]) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    """For each certificate what its nodes are, and the same by operator alone."""
    names = {n["node"].rpartition("/")[2] for n in (*a, *b)}

    def plain(text: str) -> str:
        return _WORD.sub(lambda m: "%" if m[0] in names else m[0], _SYMBOL.sub("s", text))

    def operator(n: Node) -> str:
        return str(n["operator"]) if kind(n) == "node" else kind(n)

    def what(n: Node) -> str:
        return f"{n['node'].count('/')} {operator(n)} {plain(n['value'])} {plain(n['arguments'])}"

    return (list(map(what, a)), list(map(what, b))), (list(map(operator, a)), list(map(operator, b)))
