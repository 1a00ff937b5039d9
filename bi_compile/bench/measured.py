"""What a benchmark returns, and how it takes times."""

from __future__ import annotations

import csv
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Measured:
    """What a benchmark found, as a table."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    line: str = ""
    """A sentence about the whole of it."""

    def add_row(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)


Benchmark = Callable[[], Measured]


def write(measured: Measured, path: Path) -> None:
    """The table's header and rows as CSV."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([measured.columns, *measured.rows])


def interleaved(functions: list[Callable[[], Any]], seconds: float = 0.4) -> list[float]:
    """The median time of each function, in seconds; calls take turns, so that a slow moment of the machine hits all."""
    for f in functions:
        f()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(times[0]) < 5:
        for f, t in zip(functions, times, strict=True):
            start = time.perf_counter()
            f()
            t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))
