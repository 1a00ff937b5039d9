"""What `bi-compile bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .. import bench
from .console import table


def show(names: Sequence[str], csv: Path | None, json: Path | None, out: Console) -> None:
    """Run benchmarks and print each when it is done; see `bench.run`."""
    for name, measured in bench.run(names, csv, json):
        found = table(measured.title, *measured.columns, right=measured.columns[1:])
        for row in measured.rows:
            found.add_row(*row)
        out.print(found)
        if measured.line:
            out.print(f"{name}: {measured.line}\n")
