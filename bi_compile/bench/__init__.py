"""What batch invariance costs on this machine: each number is a ratio of two timings of one run, above 1 is faster than the peer.

python -m bi_compile.bench [NAME]...
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console

console = Console()


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
