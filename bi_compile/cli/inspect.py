"""What `bi-compile inspect DIR` prints: a dump (see `dump`) as tables."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..errors import OptionError
from ..ops import NAMESPACE
from ..report.data import read_json
from .console import table

#: verdicts that keep a graph from being batch-invariant, as `audit` names them
OBJECTIONS = ("variant", "mixes rows", "unproven")


@dataclasses.dataclass(frozen=True)
class DumpedGraph:
    """One `graph_NNN_stage` folder."""

    name: str
    before: int | None
    """Operators in the graph as it came; None where the compilation stopped before it was handed on."""
    after: int | None
    """Operators in the graph as it was handed on."""
    steps: list[dict[str, Any]]
    """The passes that did something."""
    audit: dict[str, Any] | None
    """The verdicts; only a graph that is about to run is judged."""
    finished: bool = True
    """Whether its compilation went on to the end of the passes, or what ran was never compiled."""

    @property
    def stopped(self) -> bool:
        """Whether its compilation stopped before it was judged."""
        return self.audit is None and not (self.finished and self.name.endswith("_captured"))

    @property
    def verdict(self) -> str:
        if self.audit is not None:
            return "NOT batch-invariant" if self.objections else "batch-invariant"
        return "not judged: the compilation stopped" if self.stopped else "not judged here: audited in its final graph"

    @property
    def objections(self) -> list[dict[str, Any]]:
        return [n for n in (self.audit or {}).get("nodes", ()) if n["verdict"] in OBJECTIONS]

    @property
    def trusted(self) -> list[dict[str, Any]]:
        return [n for n in (self.audit or {}).get("nodes", ()) if n["verdict"] == "trusted"]


#: a graph has the first; what ran uncompiled has the second alone
_MARKS = ("00_before.py", "audit.json")


def read(folder: Path) -> list[DumpedGraph]:
    """The graphs of a dump.

    Raises:
        OptionError: the folder is not a dump, or a file in it cannot be read.
    """
    found = (
        sorted(p for p in folder.glob("graph_*") if any((p / name).is_file() for name in _MARKS))
        if folder.is_dir()
        else []
    )
    if not found:
        what = "holds no dump of bi_compile" if folder.is_dir() else "is not a folder"
        raise OptionError(
            f"{str(folder)!r} {what}: name the folder that the option dump_dir named, as in "
            'torch.compile(model, backend="bi_ascend", options={"dump_dir": "DIR"})'
        )
    return [_read_graph(path) for path in found]


def _read_graph(path: Path) -> DumpedGraph:
    graph, audit = read_json(path / "changes.json"), read_json(path / "audit.json")
    try:
        if graph is None:  # the compilation stopped in the middle of a pass, or there was none
            return DumpedGraph(path.name, None, None, [], audit, not (path / _MARKS[0]).is_file())
        return DumpedGraph(path.name, graph["nodes_before"], graph["nodes_after"], graph["passes"], audit)
    except (TypeError, KeyError) as error:
        raise OptionError(
            f"{str(path / 'changes.json')!r} is not of this version of bi_compile ({error!r}): make the dump again"
        ) from error


def to_json(graphs: list[DumpedGraph]) -> list[dict[str, Any]]:
    """What the tables say, for a program."""
    return [
        {
            "graph": g.name,
            "verdict": g.verdict,
            "target": (g.audit or {}).get("target"),
            "nodes_before": g.before,
            "nodes_after": g.after,
            "passes": [{**step, "changes": _counted_changes(step)} for step in g.steps],
            "left": g.objections,
            "trusted": g.trusted,
        }
        for g in graphs
    ]


def tables(graphs: list[DumpedGraph]) -> Iterator[Table]:
    """The dump as tables: the graphs; then for each what the passes did, what is left and what is trusted."""
    yield _graphs(graphs)
    for g in graphs:
        if g.steps:
            yield _passes(g)
        if g.objections:
            yield _verdicts(f"{g.name}: left, what keeps it from being batch-invariant", g.objections)
        if g.trusted:
            yield _verdicts(f"{g.name}: trusted, native operators that are declared invariant", g.trusted)


_COLOURS = {"batch-invariant": "green", "NOT batch-invariant": "red", "not judged: the compilation stopped": "red"}


def _graphs(graphs: list[DumpedGraph]) -> Table:
    numbers = ("nodes", "replaced", "trusted", "left")
    found = table("Graphs", "graph", "verdict", *numbers, right=numbers, whole=("graph",))
    for g in graphs:
        verdict = f"{g.verdict} on {g.audit['target']}" if g.audit else g.verdict
        colour = _COLOURS.get(g.verdict, "default")
        counts = (sum(len(step["changes"]) for step in g.steps), len(g.trusted), len(g.objections))
        nodes = "" if g.before is None else f"{g.before} to {g.after}"
        found.add_row(g.name, f"[{colour}]{verdict}[/]", nodes, *map(str, counts))
    return found


def _counted_changes(step: dict[str, Any]) -> list[dict[str, Any]]:
    """The changes of a pass, equal ones counted."""
    counts = Counter((c["operator"], tuple(c["by"])) for c in step["changes"])
    return [{"operator": operator, "by": list(by), "count": n} for (operator, by), n in counts.items()]


def _passes(graph: DumpedGraph) -> Table:
    title = f"{graph.name}: what the passes did"
    found = table(title, "pass", "operator", "replaced by", "count", "ms", right=("count", "ms"), whole=("pass",))
    for step in graph.steps:
        for i, c in enumerate(_counted_changes(step)):
            first = (step["pass"], f"{step['seconds'] * 1e3:.1f}") if i == 0 else ("", "")
            by = ", ".join(name if n == 1 else f"{n} {name}" for name, n in Counter(map(_ours, c["by"])).items())
            found.add_row(first[0], c["operator"], by, str(c["count"]), first[1])
    return found


def _ours(operator: str) -> str:
    """Our operators as the documentation writes them."""
    space, _, name = operator.partition(".")
    return f"{space}::{name.removesuffix('.default')}" if space == NAMESPACE else operator


def _verdicts(title: str, nodes: list[dict[str, Any]]) -> Table:
    found = table(title, "operator", "count", "verdict, why, where", right=("count",))
    counts = Counter((n["operator"], n["verdict"], n["reason"], n["where"]) for n in nodes)
    for (operator, verdict, reason, where), n in counts.items():
        said = f"{verdict}: {reason}" + (f"\n{where}" if where else "")
        found.add_row(operator, str(n), escape(said))
    return found
