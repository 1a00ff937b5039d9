"""What the page shows, read from a dump (see `bi_compile.dump`), as JSON that does not repeat itself.

title, version
frames      [file, line, function, code] of every line of a program
stacks      lists of frames, the outermost first
excerpts    file -> line number -> the line as HTML
reasons     of verdicts
graphs      for each: name, target, state, passes, certificate, nodes (what was handed on), before (nodes as they came: a number where
            the node is also in `nodes`, unchanged), rows (how the two are aligned)
bisection   what `bi-compile bisect --write` wrote
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ..audit import certificate
from ..errors import OptionError
from .source import excerpts

#: verdicts that keep a graph from being batch-invariant, as `audit` names them
OBJECTIONS = ("variant", "mixes rows", "unproven")


class _Table:
    """Things by number, each once."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, thing: Any) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))


def read(folder: Path, bisection: Path | None = None) -> dict[str, Any]:
    """The data of the page. Raises OptionError: the folder is no dump, or a file in it cannot be read."""
    from .. import __version__

    if not folder.is_dir():
        raise OptionError(f"{str(folder)!r} is not a folder: name the folder that the option dump_dir named")
    paths = [p for p in sorted(folder.glob("graph_*")) if (p / "before.json").is_file() or (p / "audit.json").is_file()]
    if not paths:
        raise OptionError(
            f"{str(folder)!r} holds no dump of this version of bi_compile: name the folder that the option dump_dir named, or make the dump again"
        )
    frames, stacks, reasons = _Table(), _Table(), _Table()
    graphs = [_graph(path, frames, stacks, reasons) for path in paths]
    return {
        "title": folder.resolve().name,
        "version": __version__,
        "frames": [list(f) for f in frames.numbers],
        "stacks": [list(s) for s in stacks.numbers],
        "excerpts": excerpts((file, line, code) for file, line, _, code in frames.numbers),
        "reasons": list(reasons.numbers),
        "graphs": graphs,
        "bisection": None if bisection is None else _bisection(bisection),
    }


def _graph(path: Path, frames: _Table, stacks: _Table, reasons: _Table) -> dict[str, Any]:
    changes = read_json(path / "changes.json")
    audit = certificate.read(path / "audit.json")[path.name] if (path / "audit.json").is_file() else None
    verdicts = {n["node"]: n for n in (audit or {}).get("nodes", ())}
    before = _nodes(path / "before.json", frames, stacks)
    after = _nodes(path / "after.json", frames, stacks)
    uncompiled = before is None
    if uncompiled:  # what ran without a graph has verdicts alone
        after = [_bare(n, frames, stacks) for n in verdicts.values()]
    if (uncompiled and (path / "00_before.py").is_file()) or (after is None and verdicts):
        raise OptionError(f"{str(path)!r} is not of this version of bi_compile: make the dump again")
    came = before or []
    nodes = came if after is None else after  # a compilation that stopped handed nothing on
    rows = [] if after is None or uncompiled else _aligned(came, nodes)
    taken = {c["node"]: c for step in (changes or {}).get("passes", ()) for c in step["changes"]}
    at = {json.dumps(n): i for i, n in enumerate(nodes)}
    shared = [at.get(json.dumps(n), n) for n in came]
    for n in nodes:
        verdict = verdicts.get(n["name"])
        if verdict is not None:
            n["verdict"], n["reason"] = verdict["verdict"], reasons(verdict["reason"])
            n["rowsIn"], n["rowsOut"] = verdict["rows_in"], verdict["rows_out"]
    for n in came:
        if n["name"] in taken:
            change = taken[n["name"]]
            n["pass"], n["by"] = change["pass_name"], change["by"]
    if audit is not None:
        audit = {k: v for k, v in audit.items() if k != "nodes"}
    return {
        "name": path.name,
        "target": (audit or {}).get("target", ""),
        "state": _state(path.name, changes, audit, uncompiled),
        "operators": None if changes is None else [changes["nodes_before"], changes["nodes_after"]],
        "passes": [
            {"name": s["pass"], "ms": round(s["seconds"] * 1e3, 1), "count": len(s["changes"])}
            for s in (changes or {}).get("passes", ())
        ],
        "certificate": audit,
        "nodes": nodes,
        "before": shared,
        "rows": rows,
    }


def _state(name: str, changes: Any, audit: Any, uncompiled: bool) -> str:
    """`invariant`, `not invariant`, `handed on` (judged in its final graph) or `stopped`."""
    if audit is not None:
        return "invariant" if audit["invariant"] else "not invariant"
    return "handed on" if changes is not None and not uncompiled and not name.endswith("_final") else "stopped"


def _nodes(path: Path, frames: _Table, stacks: _Table) -> list[dict[str, Any]] | None:
    data = read_json(path)
    if data is None:
        return None
    numbers = [frames(tuple(f)) for f in data["frames"]]
    found = []
    for n in data["nodes"]:
        node = {
            "name": n["node"],
            "op": n["op"],
            "operator": n["operator"],
            "arguments": n["arguments"],
            "value": n["value"],
            "stride": n["stride"],
            "inputs": n["inputs"],
            "stack": stacks(tuple(numbers[i] for i in n["stack"])),
            "own": n["own"],
        }
        for key in ("layer", "input", "made"):
            if n.get(key):
                node[key] = n[key]
        found.append(node)
    return found


def _bare(verdict: dict[str, Any], frames: _Table, stacks: _Table) -> dict[str, Any]:
    """A node of which nothing but the verdict is known: an operator that ran without a graph."""
    file, _, line = verdict["where"].partition(", line ")
    number, _, function = line.partition(", in ")
    stack = (frames((file, int(number), function, "")),) if number.isdigit() else ()
    return {
        "name": verdict["node"],
        "op": "uncompiled",
        "operator": verdict["operator"],
        "arguments": verdict["arguments"],
        "value": verdict["value"],
        "stride": "",
        "inputs": [],
        "stack": stacks(stack),
        "own": len(stack) - 1,
    }


def _aligned(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[list[Any]]:
    """difflib's opcodes. A node keeps its name through the passes; a replacement may take the name of what it replaces."""
    a, b = ([f"{n['name']} {n['operator']}" for n in nodes] for nodes in (before, after))
    return [list(op) for op in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()]


def _bisection(path: Path) -> Any:
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("steps"), list):
        raise OptionError(
            f"{str(path)!r} is not a bisection: name a file that `bi-compile bisect … --write FILE` wrote"
        )
    # an infinite distance in value is no number that a browser's JSON has
    shown = ("operator", "layer", "where", "elements", "of", "ulps")
    return {"line": data.get("line", ""), "steps": [{k: s.get(k) for k in shown} for s in data["steps"]]}


def read_json(path: Path) -> Any:
    """The content of a dump's file; None where a compilation that stopped did not write it."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise OptionError(f"{str(path)!r} cannot be read ({error}): make the dump again") from error
