"""What batch invariance costs on this machine: each number is a ratio of two timings of one run, above 1 is faster than the peer.

`bi-compile bench [NAME]... [--csv DIR]`. A benchmark is a function that measures and returns a table and a line about it.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import OptionError

Benchmark = Callable[[], tuple[Table, str]]


def run(names: Sequence[str], folder: Path | None, console: Console) -> None:
    """Run the benchmarks of the device at hand, or those that are named; with a folder, each table goes into NAME.csv too.

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
        table, line = BENCHES[name]()
        console.print(table)
        if line:
            console.print(f"{name}: {line}\n")
        if folder is not None:
            write(table, folder / f"{name}.csv")


def write(table: Table, path: Path) -> None:
    """The table's header and rows as CSV."""
    with path.open("w", newline="") as file:
        rows = zip(*(column.cells for column in table.columns), strict=True)
        csv.writer(file).writerows([[column.header for column in table.columns], *rows])


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
