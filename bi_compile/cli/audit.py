"""What `bi-compile audit` prints: certificates node by node, what differs between two, a model on Ascend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..audit import certificate


def tables(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Certificates for a terminal: one table each, a line for each node that computes something."""
    for name, c in found.items():
        verdict = "batch-invariant" if c["invariant"] else "NOT batch-invariant"
        head = f"{name}: {verdict} on {c['target']}, graph {c['graph'][:16]}"
        facts = [f"{k} {v}" for k, v in c["versions"].items()] + [f"trust {k}: {v}" for k, v in c["trust"].items()]
        facts.append("passes " + ", ".join(f"{p['name']} {p['uuid'][:8]}" for p in c["passes"]))
        table = Table(
            title=escape(head), caption=escape("; ".join(facts)), title_justify="left", caption_justify="left"
        )
        for column in ("node", "operator", "value", "rows in", "rows out", "verdict", "reason", "where"):
            table.add_column(column, overflow="fold")
        for n in c["nodes"]:
            rows_in = ", ".join(f"{x}: {', '.join(map(str, dims))}" for x, dims in n["rows_in"].items())
            cells = (
                n["node"],
                n["operator"],
                n["value"],
                rows_in,
                ", ".join(map(str, n["rows_out"])),
                n["verdict"],
                n["reason"],
                n["where"],
            )
            table.add_row(*map(escape, cells))
        yield table


def differences(a: Path, b: Path) -> tuple[Table, int]:
    """What differs between two certificates, or between those of two dumps; how many differences there are."""
    one, other = certificate.read(a), certificate.read(b)
    table = Table("graph", "what", str(a), str(b), title="Differences", title_justify="left")
    if len(one) == len(other) == 1:  # two files: whatever their graphs are called
        other = dict(zip(one, other.values(), strict=True))
    for name in dict.fromkeys((*one, *other)):
        if name not in one or name not in other:
            table.add_row(name, "the whole graph", *("judged" if name in x else "" for x in (one, other)))
            continue
        for d in certificate.compare(one[name], other[name]):
            table.add_row(*map(escape, (name, *d)))
    if not table.row_count:
        table.caption = "none: the same graphs, versions, passes and trust"
    return table, table.row_count


def offline(model: Path, target: str, out: Console) -> bool:
    """`bi-compile audit --target`: print what the passes would do to a model on Ascend; whether nothing is left."""
    from ..offline import trace

    found = trace.run(model, target, lambda line: out.print(line))
    title = f"{found.model} on {found.target}"
    table = Table("operator", "nodes", "after the passes", title=title, title_justify="left")
    left = {f.operator: f.reason for f in found.left}
    for name, count in sorted(found.varies.items()):
        gone = "replaced" if name in found.replaced else "gone: nothing used it any more"
        table.add_row(name, str(count), f"left: {left[name]}" if name in left else gone)
    for name, reason in sorted(found.trusted.items()):
        table.add_row(name, "", f"trusted: {reason}")
    for name in sorted(set(left) - set(found.varies)):
        table.add_row(name, "", f"left: {left[name]}")
    out.print(table)
    out.print(f"{found.nodes} nodes; {sum(found.replaced.values())} replaced, {len(found.left)} left")
    return not found.left
