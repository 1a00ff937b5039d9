"""Each row among others against the row alone, over a plan of batches, as bits; and the smallest counterexample."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MeasureError
from .bits import Difference, difference
from .plan import SIZES, Batch, Plan, batch_from, make_plan
from .progress import Progress, quiet
from .row_function import Case, Function, Place, recompiling


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A row whose bits in a batch are not those that it has alone."""

    batch: Batch
    place: int
    """Where in the batch the row stands."""
    row: int
    """Which row of the inputs it is."""
    output: int
    difference: Difference

    def __str__(self) -> str:
        return (
            f"row {self.row} at place {self.place} of {self.batch}: output {self.output} differs in {self.difference}"
        )


@dataclasses.dataclass
class Evidence:
    """What a run of a plan found."""

    name: str
    seed: int
    batches: Counter[str] = dataclasses.field(default_factory=Counter)
    """For each kind of batch, how many ran."""
    rows: Counter[str] = dataclasses.field(default_factory=Counter)
    """For each kind of batch, how many rows were compared with the row alone."""
    mismatch: Mismatch | None = None
    """The smallest that was found; the plan ends at the first mismatch."""
    left: int = 0
    """Batches of the plan that did not run: the time was up, or a mismatch was found."""
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)
    """Kinds of batches that could not be tried here, and why."""
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether every row that was compared had the bits that it has alone."""
        return self.mismatch is None

    def to_json(self) -> dict[str, Any]:
        """All of it, for a program."""
        numbers = {
            "name": self.name,
            "seed": self.seed,
            "seconds": self.seconds,
            "left": self.left,
            "equal": self.equal,
        }
        kinds = {"batches": dict(self.batches), "rows": dict(self.rows), "not_run": self.not_run}
        return numbers | kinds | {"mismatch": self.mismatch and dataclasses.asdict(self.mismatch)}

    def line(self) -> str:
        if self.mismatch is not None:
            return f"{self.name} is not batch-invariant: {self.mismatch}"
        cut = f"; time limit reached: {self.left} batches did not run" if self.left else ""
        if not self.rows.total():
            return f"{self.name}: nothing was compared ({self.seconds:.1f} s){cut}; raise the time limit"
        return (
            f"{self.name}: no mismatch in {self.rows.total()} rows of {self.batches.total()} batches "
            f"({self.seconds:.1f} s, seed {self.seed}){cut}"
        )


def verify(
    fn: Function | str,
    inputs: Sequence[Any],
    batch_dims: int | Sequence[int | None] = 0,
    *,
    backend: str | None = None,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    time_limit: float = 300.0,
    progress: Progress = quiet,
) -> Evidence:
    """Run `fn` over batches of its inputs' rows, and compare each row with the row alone as bits.

    fn: a function, a module, something compiled, or an import path "package.module:name". It must be deterministic and
        return one or more tensors, in each of which one dimension grows with the batch.
    inputs: its positional arguments, all rows together. Rows are taken from them; a batch that is larger repeats them.
    batch_dims: as `in_dims` of torch.vmap: one dimension for every tensor, or for each input a dimension or None.
    backend: compile `fn` with this backend of torch.compile. Static and dynamic graphs are then tried too, and
        torch.compile's caches of this process are reset.
    sizes: batch sizes.
    time_limit: seconds after which no further batch starts.
    progress: called after each batch, with what ran and the part of the plan that is done.

    Raises:
        MeasureError: what cannot be compared, in one sentence. Whatever `fn` raises is raised.
    """
    case = Case(fn, inputs, batch_dims, backend)
    counts = sorted({1, max(2, torch.get_num_threads(), os.cpu_count() or 1)})
    plan = make_plan(
        case.rows,
        seed,
        sizes,
        floating=case.floating,
        threads=counts,
        process=case.path is not None,
        graphs=backend is not None,
    )
    with recompiling():
        evidence = run(case, plan, time_limit, progress)
    if case.path is None:
        evidence.not_run["process"] = "the function has no import path: give it as package.module:name"
    if not case.floating:
        evidence.not_run["neighbours, padding"] = "no input with a batch dimension is floating-point"
    if backend is None:
        evidence.not_run["graph"] = "nothing is compiled here: name a backend"
    return evidence


def run(case: Case, plan: Plan, time_limit: float = 300.0, progress: Progress = quiet) -> Evidence:
    """Run `plan` up to the first mismatch, and make that one small."""
    start = time.monotonic()
    evidence = Evidence(case.name, plan.seed)
    comparison = Comparison(case)
    for left, (batch, outputs) in _outputs(case, plan, start + time_limit):
        evidence.left = left
        evidence.batches[batch.kind] += 1
        evidence.rows[batch.kind] += sum(1 for _ in batch.compared())
        mismatch = comparison(batch, outputs)
        progress(f"{batch.kind}: {batch}", 1 - left / len(plan.batches))
        if mismatch is not None:
            evidence.mismatch = shrink(comparison, mismatch, time.monotonic() + min(time_limit, 60))
            break
    else:
        evidence.left = len(plan.batches) - evidence.batches.total()
    evidence.seconds = time.monotonic() - start
    return evidence


def _outputs(case: Case, plan: Plan, deadline: float) -> Iterator[tuple[int, tuple[Batch, list[Tensor]]]]:
    """(how many are left, (batch, its outputs)), until the deadline; those of the second process last, in one go."""
    here = [b for b in plan.batches if not b.process]
    there = [b for b in plan.batches if b.process]
    left = len(plan.batches)
    # as it is first: torch.compile chooses; then static and dynamic graphs, without going to and fro
    for batch in sorted(here, key=lambda b: (None, False, True).index(b.dynamic)):
        if time.monotonic() > deadline:
            return
        left -= 1
        yield left, (batch, case(batch))
    if there and time.monotonic() <= deadline:
        for batch, outputs in zip(there, case.elsewhere(there), strict=True):
            left -= 1
            yield left, (batch, outputs)


class Comparison:
    """Rows in a batch against the rows alone, which are computed once.

    Raises:
        MeasureError: an output has no batch dimension, or the function is not deterministic.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.places: list[Place] = case.places()
        self._alone: dict[int, list[Tensor]] = {}
        for batch in (Batch((0,)), Batch(tuple(range(case.rows)))):
            for i, (a, b) in enumerate(zip(case(batch), case(batch), strict=True)):
                found = difference(a, b)
                if found is not None:
                    raise MeasureError(
                        f"{case.name} is not deterministic: the same batch of {len(batch.rows)} gave different bits the second time "
                        f"(output {i}: {found}), so rows cannot be compared; take out what draws random numbers or adds in any order"
                    )

    def alone(self, row: int) -> list[Tensor]:
        if row not in self._alone:
            self._alone[row] = self.case(Batch((row,)))
        return self._alone[row]

    def __call__(self, batch: Batch, outputs: list[Tensor]) -> Mismatch | None:
        """The first row of the batch that differs."""
        for place, row in batch.compared():
            if not len(self.places) == len(self.alone(row)) == len(outputs):
                raise MeasureError(
                    f"{self.case.name} returns {len(self.alone(row))} tensors for a row alone and {len(outputs)} for {batch}"
                )
            for i, (where, a, b) in enumerate(zip(self.places, self.alone(row), outputs, strict=True)):
                got = where.of(b, place)
                if a.shape != got.shape:
                    raise MeasureError(
                        f"output {i} of {self.case.name} is {list(a.shape)} for a row alone and {list(got.shape)} for it in a batch"
                    )
                found = difference(a, got)
                if found is not None:
                    return Mismatch(batch, place, row, i, found)
        return None

    def again(self, batch: Batch) -> Mismatch | None:
        """Run `batch` wherever it says, and compare."""
        return self(batch, self.case.elsewhere([batch])[0] if batch.process else self.case(batch))


def shrink(comparison: Comparison, mismatch: Mismatch, deadline: float) -> Mismatch:
    """The same row, with as few and as plain neighbours as still make it differ; greedy, until `deadline`."""
    again = True
    while again and time.monotonic() < deadline:
        again = False
        for batch in _simpler(mismatch):
            found = comparison.again(batch)
            if found is not None:
                mismatch, again = found, True
                break
            if time.monotonic() > deadline:
                break
    return mismatch


def _simpler(mismatch: Mismatch) -> Iterator[Batch]:
    """Batches that are plainer than the mismatch's, the plainest first; each holds its row."""
    batch, place, row = mismatch.batch, mismatch.place, mismatch.row
    n, rows = len(batch.rows), batch.rows
    plain: list[dict[str, Any]] = [
        {"process": False},
        {"dynamic": None},
        {"layout": "contiguous"},
        {"threads": None},
        {"fills": ()},
        {"fills": tuple((p, "zero") for p, _ in batch.fills)},
    ]
    for change in plain:
        simpler = dataclasses.replace(batch, **change)
        zeros_now = batch.fills and all(fill == "zero" for _, fill in batch.fills)
        if simpler != batch and not (change == {"fills": ()} and zeros_now):
            yield simpler
    # neighbours that are all zero, from the fewest rows on
    for size in range(1, n + 1):
        at = min(place, size - 1)
        fills = tuple((p, "zero") for p in range(size) if p != at)
        simpler = dataclasses.replace(batch, rows=(row,) * size, fills=fills)
        if _smaller(simpler, batch):
            yield simpler
    for size in range(1, n):
        start = min(place, n - size)
        fills = tuple((p - start, fill) for p, fill in batch.fills if start <= p < start + size)
        yield dataclasses.replace(batch, rows=rows[start : start + size], fills=fills)


def _smaller(simpler: Batch, batch: Batch) -> bool:
    """Whether a batch of zeros is a step down: fewer rows, or the first of that kind."""
    zeros = sum(fill == "zero" for _, fill in batch.fills)
    return len(simpler.rows) < len(batch.rows) or zeros < len(batch.rows) - 1


PROGRAM = '''\
"""{title}

Written by bi-compile verify. `python {name}` runs the row alone and in its batch and prints how they differ.
Exit code 1: they do, 0: they do not, 3: it failed.
"""
import sys
import traceback
from pathlib import Path

sys.path[:0] = {paths!r}
try:
    from bi_compile.measure.verify import replay

    code = replay(Path(__file__).with_suffix(".pt"), {fn})
except Exception:
    traceback.print_exc()
    code = 3
sys.exit(code)
'''


def write(case: Case, mismatch: Mismatch, path: Path) -> None:
    """A program that shows the mismatch, and beside it (.pt) its inputs.

    Raises:
        MeasureError: the function has no import path, so that no program can name it.
    """
    if case.path is None:
        raise MeasureError(f"{case.name} has no import path, so no program can name it: give it as package.module:name")
    data = {
        "inputs": case.inputs,
        "dims": case.dims,
        "backend": case.backend,
        "batch": dataclasses.asdict(mismatch.batch),
        "versions": {"torch": str(torch.__version__)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, path.with_suffix(".pt"))
    title = str(mismatch)[0].upper() + str(mismatch)[1:] + "."
    path.write_text(PROGRAM.format(title=title, name=path.name, paths=[_root(case.path)], fn=repr(case.path)))


def _root(path: str) -> str:
    """The folder from which the module of an import path was imported."""
    module = path.partition(":")[0]
    return str(Path(str(sys.modules[module].__file__)).resolve().parents[module.count(".")])


def replay(path: Path, fn: Function | str) -> int:
    """Run a counterexample again; prints what differs. 1: it does, 0: it does not."""
    data = torch.load(path)
    case = Case(fn, data["inputs"], data["dims"], data["backend"])
    with recompiling():
        mismatch = Comparison(case).again(batch_from(data["batch"]))
    print(
        mismatch or f"no mismatch here, with torch {torch.__version__}; it was found with {data['versions']['torch']}"
    )
    return mismatch is not None
