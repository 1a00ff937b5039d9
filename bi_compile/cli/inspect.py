"""What `bi-compile inspect DIR` prints: a dump (see `dump`) as tables."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..errors import OptionError

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
        OptionError: the folder is no dump, or a file in it cannot be read.
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
    graph, audit = _json(path / "changes.json"), _json(path / "audit.json")
    try:
        if graph is None:  # the compilation stopped in the middle of a pass, or there was none
            return DumpedGraph(path.name, None, None, [], audit, not (path / _MARKS[0]).is_file())
        return DumpedGraph(path.name, graph["nodes_before"], graph["nodes_after"], graph["passes"], audit)
    except (TypeError, KeyError) as error:
        raise OptionError(
            f"{str(path / 'changes.json')!r} is not of this version of bi_compile ({error!r}): make the dump again"
        ) from error


def _json(path: Path) -> Any:
    """The file's content; None where a compilation that stopped did not write it."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise OptionError(f"{str(path)!r} cannot be read ({error}): make the dump again") from error


def tables(graphs: list[DumpedGraph]) -> Iterator[Table]:
    """The dump as tables: graphs, passes, what is left, what is trusted."""
    yield _graphs(graphs)
    yield _passes(graphs)
    yield _verdicts(
        "Left: what keeps a graph from being batch-invariant", [(g.name, n) for g in graphs for n in g.objections]
    )
    yield _verdicts(
        "Trusted: native operators that are declared invariant", [(g.name, n) for g in graphs for n in g.trusted]
    )


def _graphs(graphs: list[DumpedGraph]) -> Table:
    table = Table("graph", "target", "verdict", title="Graphs", title_justify="left")
    for name in ("nodes before", "after", "replaced", "trusted", "left"):
        table.add_column(name, justify="right")
    for g in graphs:
        if g.audit is None:
            target, verdict = (
                "",
                "not judged here: audited in its final graph"
                if not g.stopped
                else "[red]not judged: the compilation stopped[/]",
            )
        else:
            target, verdict = g.audit["target"], "[red]not invariant[/]" if g.objections else "[green]invariant[/]"
        replaced = sum(len(step["changes"]) for step in g.steps)
        table.add_row(
            g.name,
            target,
            verdict,
            *("" if n is None else str(n) for n in (g.before, g.after, replaced, len(g.trusted), len(g.objections))),
        )
    return table


def _passes(graphs: list[DumpedGraph]) -> Table:
    table = Table("graph", "pass", "operator", "replaced by", title="What the passes did", title_justify="left")
    table.add_column("count", justify="right")
    table.add_column("ms", justify="right")
    for g in graphs:
        for step in g.steps:
            counts = Counter((c["operator"], tuple(c["by"])) for c in step["changes"])
            for i, ((operator, by), n) in enumerate(counts.items()):
                table.add_row(
                    g.name,
                    step["pass"],
                    operator,
                    ", ".join(_counted(by)),
                    str(n),
                    f"{step['seconds'] * 1e3:.1f}" if i == 0 else "",
                )
    if not table.row_count:
        table.caption = "nothing was replaced"
    return table


def _counted(names: tuple[str, ...]) -> list[str]:
    return [name if n == 1 else f"{n} {name}" for name, n in Counter(names).items()]


def _verdicts(title: str, nodes: list[tuple[str, dict[str, Any]]]) -> Table:
    table = Table("graph", "operator", "verdict", "count", "reason", "where", title=title, title_justify="left")
    counts = Counter((g, n["operator"], n["verdict"], n["reason"], n["where"]) for g, n in nodes)
    for (graph, operator, verdict, reason, where), n in counts.items():
        table.add_row(graph, operator, verdict, str(n), escape(reason), escape(where))
    if not nodes:
        table.caption = "none"
    return table
