"""What `bi-compile audit` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table


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
