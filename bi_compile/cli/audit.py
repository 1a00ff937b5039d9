"""What `bi-compile audit` prints: certificates node by node, what differs between two, a model on Ascend."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..audit import certificate
from ..audit.compare import compare
from .console import table

#: what is shown without being asked for; inputs, views and other row-local nodes are most of a graph
SHOWN = ("variant", "mixes rows", "unproven", "trusted", "replaced")


def chosen(c: Mapping[str, Any], verdicts: Sequence[str], operators: Sequence[str]) -> list[dict[str, Any]]:
    """The nodes of a certificate with one of the verdicts, and one of the operators (`*` as in file names), in order."""
    return [
        n
        for n in c["nodes"]
        if n["verdict"] in verdicts
        and (not operators or any(fnmatch.fnmatchcase(n["operator"], f"*{pattern}*") for pattern in operators))
    ]


def tables(
    found: Mapping[str, Mapping[str, Any]], verdicts: Sequence[str], operators: Sequence[str], nodes: bool
) -> Iterator[Table]:
    """Certificates for a terminal: one table each, a line for each operator and reason, or with `nodes` for each node."""
    for name, c in found.items():
        verdict = "batch-invariant" if c["invariant"] else "NOT batch-invariant"
        head = f"{name}: {verdict} on {c['target']}, graph {c['graph'][:16]}"
        picked = chosen(c, verdicts, operators)
        hidden = len(c["nodes"]) - len(picked)
        facts = [", ".join(f"{n} {verdict}" for verdict, n in c["counts"].items())]
        facts += [f"{hidden} nodes are not shown (--all, --verdict, --op)"] if hidden else []
        facts += [", ".join(f"{k} {v}" for k, v in c["versions"].items())]
        facts += [f"trust {k}: {v}" for k, v in c["trust"].items()]
        facts.append("passes " + ", ".join(f"{p['name']} {p['uuid'][:8]}" for p in c["passes"]))
        shown = (_by_node if nodes else _by_operator)(escape(head), picked)
        shown.caption = escape("\n".join(facts))
        yield shown


def _by_operator(title: str, nodes: Sequence[Mapping[str, Any]]) -> Table:
    found = table(title, "operator", "count", "verdict, why, first at", right=("count",))
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for n in nodes:
        groups.setdefault((n["operator"], n["verdict"], n["reason"]), []).append(n)
    for key, group in sorted(
        groups.items(), key=lambda item: SHOWN.index(item[0][1]) if item[0][1] in SHOWN else len(SHOWN)
    ):
        operator, verdict, reason = key
        where = f"\n{group[0]['where']}" if group[0]["where"] else ""
        found.add_row(escape(operator), str(len(group)), escape(f"{verdict}: {reason}{where}"))
    return found


def _by_node(title: str, nodes: Sequence[Mapping[str, Any]]) -> Table:
    found = table(title, "node", "value", "rows in", "rows out", "verdict, why, where", lines=True)
    for n in nodes:
        rows_in = ", ".join(f"{x}: {', '.join(map(str, dims))}" for x, dims in n["rows_in"].items())
        rows_out = ", ".join(map(str, n["rows_out"]))
        name = n["node"] if n["node"] == n["operator"] else f"{n['node']}\n{n['operator']}"
        where = f"\n{n['where']}" if n["where"] else ""
        found.add_row(*map(escape, (name, n["value"], rows_in, rows_out, f"{n['verdict']}: {n['reason']}{where}")))
    return found


class GraphDifference(NamedTuple):
    """One difference of a graph's certificate; `a` or `b` is empty where that one lacks it."""

    graph: str
    what: str
    a: str
    b: str


def differences(a: Path, b: Path) -> list[GraphDifference]:
    """What differs between two certificates, or between those of two dumps."""
    one, other = certificate.read(a), certificate.read(b)
    if len(one) == len(other) == 1:  # two files: whatever their graphs are called
        other = dict(zip(one, other.values(), strict=True))
    found = []
    for name in dict.fromkeys((*one, *other)):
        if name in one and name in other:
            found += [GraphDifference(name, *d) for d in compare(one[name], other[name])]
        else:
            found.append(
                GraphDifference(name, "the whole graph", *("judged" if name in x else "" for x in (one, other)))
            )
    return found


def differences_table(a: Path, b: Path, found: Sequence[GraphDifference]) -> Table:
    shown = table("Differences", "graph", "what", str(a), str(b))
    for d in found:
        shown.add_row(*map(escape, d))
    return shown


def offline(model: Path, target: str, dump: Path | None, out: Console) -> bool:
    """`bi-compile audit --target`: print what the passes would do to a model on Ascend; whether nothing is left."""
    from ..offline import trace

    found = trace.run(model, target, lambda line: out.print(line), dump)
    title = f"{found.model} on {found.target}"
    shown = table(title, "operator", "nodes", "after the passes", right=("nodes",))
    left = {f.operator: f.reason for f in found.left}
    for name, count in sorted(found.varies.items()):
        gone = "replaced" if name in found.replaced else "gone: nothing used it any more"
        shown.add_row(name, str(count), f"left: {left[name]}" if name in left else gone)
    for name, reason in sorted(found.trusted.items()):
        shown.add_row(name, "", f"trusted: {reason}")
    for name in sorted(set(left) - set(found.varies)):
        shown.add_row(name, "", f"left: {left[name]}")
    out.print(shown)
    out.print(f"{found.nodes} nodes; {sum(found.replaced.values())} replaced, {len(found.left)} left")
    return not found.left
