"""What a benchmark returns, and how it takes times."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
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


def write_csv(measured: Measured, path: Path) -> None:
    """The table's header and rows."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([measured.columns, *measured.rows])


def write_json(measured: Measured, path: Path) -> None:
    """Title, columns, rows and the sentence, and what they hold for."""
    import torch

    from ..audit.measured import machine

    here = machine("cuda" if torch.cuda.is_available() else "cpu")
    path.write_text(json.dumps({**dataclasses.asdict(measured), **here}, indent=1))


def interleaved(functions: list[Callable[[], Any]], seconds: float = 0.4, turns: int = 5) -> list[float]:
    """The median time of each function, in seconds, by torch.utils.benchmark; they take turns, so that a slow moment of the machine
    hits all. seconds: how long each function runs in all."""
    import torch
    from torch.utils.benchmark import Measurement, Timer

    threads = torch.get_num_threads()  # Timer's own choice is one
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in functions]
    times: list[list[Measurement]] = [[] for _ in functions]
    for _ in range(turns):
        for timer, found in zip(timers, times, strict=True):
            found.append(timer.blocked_autorange(min_run_time=seconds / turns))
    return [next(iter(Measurement.merge(found))).median for found in times]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def ratio_of_medians(theirs: Sequence[float], ours: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The median of `theirs` by that of `ours`, and the ends of its 95 % interval by bootstrap: what it would be in most other runs, if
    their rounds were drawn from these."""
    rng = random.Random(0)

    def median(times: Sequence[float]) -> float:
        return statistics.median(rng.choices(times, k=len(times)))

    drawn = sorted(median(theirs) / median(ours) for _ in range(draws))
    return statistics.median(theirs) / statistics.median(ours), drawn[draws // 40], drawn[-(draws // 40) - 1]
