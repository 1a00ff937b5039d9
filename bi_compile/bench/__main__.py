"""Run the benchmarks of the device at hand, or those that are named."""

from __future__ import annotations

import sys

import torch


def main(names: list[str]) -> None:
    if torch.cuda.is_available():
        from .cuda import BENCHES
    else:
        from .cpu import BENCHES
    unknown = [n for n in names if n not in BENCHES]
    if unknown:
        raise SystemExit(f"unknown benchmark {', '.join(unknown)}: known here are {', '.join(BENCHES)}")
    for name in names or BENCHES:
        BENCHES[name]()


main(sys.argv[1:])
