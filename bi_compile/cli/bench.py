"""What `bi-compile bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import bench


def show(names: Sequence[str], folder: Path | None, out: Console) -> None:
    """Run benchmarks and print each when it is done; see `bench.run`."""
    for name, measured in bench.run(names, folder):
        table = Table(*measured.columns, title=measured.title)
        for row in measured.rows:
            table.add_row(*row)
        out.print(table)
        if measured.line:
            out.print(f"{name}: {measured.line}\n")
