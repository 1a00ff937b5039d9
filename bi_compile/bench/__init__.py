"""What batch invariance costs on this machine: each number is a ratio of two timings of one run, above 1 is faster than the peer.

`bi-compile bench [NAME]... [--csv DIR]`. A benchmark is a function that returns what it `Measured`.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError


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


def run(names: Sequence[str], folder: Path | None) -> Iterator[tuple[str, Measured]]:
    """Run the benchmarks of the device at hand, or those that are named, and yield each with its name when it is done.

    With a folder, each table goes into NAME.csv there.

    Raises:
        OptionError: an unknown name, or the folder cannot be written.
    """
    import torch

    if torch.cuda.is_available():
        from .cuda import BENCHES
    else:
        from .cpu import BENCHES
    unknown = [n for n in names if n not in BENCHES]
    if unknown:
        raise OptionError(f"unknown benchmark {', '.join(unknown)}: known here are {', '.join(BENCHES)}")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"--csv {str(folder)!r} cannot be written ({error.strerror}): name a folder that can"
            ) from error
    for name in names or BENCHES:
        measured = BENCHES[name]()
        if folder is not None:
            write(measured, folder / f"{name}.csv")
        yield name, measured


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
