"""What batch invariance costs on this machine: each number is a ratio of two timings of one run, above 1 is faster than the peer.

`bi-compile bench [NAME]... [--csv DIR]`. A benchmark is a function that returns what it `Measured`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import OptionError, meant
from .measured import Measured, write


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
        raise OptionError(
            f"unknown benchmark {', '.join(n + meant(n, BENCHES) for n in unknown)}: known here are {', '.join(BENCHES)}"
        )
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
