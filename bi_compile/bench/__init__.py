"""What batch invariance costs on this machine: each number is a ratio of two timings of one run, above 1 is faster than the peer.

`bi-compile bench [NAME]... [--csv DIR] [--json DIR]`. A benchmark is a function that returns what it `Measured`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import HostError, OptionError, meant
from .measured import Measured, write_csv, write_json


def run(names: Sequence[str], csv: Path | None = None, json: Path | None = None) -> Iterator[tuple[str, Measured]]:
    """Run the benchmarks of the device at hand, or those that are named, and yield each with its name when it is done.

    csv, json: folders into which each table goes too, as NAME.csv and NAME.json.

    Raises:
        OptionError: an unknown name, or a folder cannot be written.
        HostError: a package that one of them needs is not installed.
    """
    import torch

    if torch.cuda.is_available():
        from .cuda import BENCHES, NEEDS
    else:
        from .cpu import BENCHES, NEEDS
    unknown = [n for n in names if n not in BENCHES]
    if unknown:
        raise OptionError(
            f"unknown benchmark {', '.join(n + meant(n, BENCHES) for n in unknown)}: known here are {', '.join(BENCHES)}"
        )
    missing = {n: [m for m in NEEDS.get(n, ()) if find_spec(m) is None] for n in names or BENCHES}
    if any(missing.values()):
        said = "; ".join(f"{n} needs {' and '.join(m)}" for n, m in missing.items() if m)
        rest = [n for n, m in missing.items() if not m] or [n for n in BENCHES if n not in NEEDS]
        raise HostError(f"{said}, which cannot be imported: install it, or run `bi-compile bench {' '.join(rest)}`")
    kept = [(k, f, w) for k, f, w in (("csv", csv, write_csv), ("json", json, write_json)) if f is not None]
    for kind, folder, _ in kept:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"--{kind} {str(folder)!r} cannot be written ({error.strerror}): name a folder that can"
            ) from error
    for name in names or BENCHES:
        measured = BENCHES[name]()
        for kind, folder, write in kept:
            write(measured, folder / f"{name}.{kind}")
        yield name, measured
