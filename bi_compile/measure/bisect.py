"""The first operator whose row differs, and how the difference grows from there to the output."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..errors import MeasureError
from .bits import Difference, difference
from .plan import SIZES, Batch, make_plan
from .progress import Progress, quiet
from .record import Call, Recorder, interpreting
from .row_function import Case, Function, recompiling
from .verify import Mismatch, run


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the row is among the rows of the batch: from `start` on, `length` of `total`."""

    total: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One operator, as it ran in the batch, and how its row differs."""

    operator: str
    layer: str
    where: str
    arguments: str
    difference: Difference | None


@dataclasses.dataclass
class Bisection:
    """What the comparison of two runs found."""

    steps: list[Step] = dataclasses.field(default_factory=list)
    """Every operator whose row was compared, in order."""
    unplaced: list[str] = dataclasses.field(default_factory=list)
    """Operators before the first difference whose row could not be told apart by its size."""
    unpaired: list[str] = dataclasses.field(default_factory=list)
    """Operators before the first difference that only one of the two runs called."""
    where: str = ""
    """Which part of the run was compared, where it has several."""
    mismatch: Mismatch | None = None

    @property
    def first(self) -> Step | None:
        return next((s for s in self.steps if s.difference is not None), None)

    def line(self) -> str:
        first = self.first
        if first is None:
            return NOTHING
        said = f"the first operator whose row differs is {first.operator}"
        said += f" in {first.layer}" if first.layer else ""
        said += f" ({self.where})" if self.where else ""
        said += f", {first.where}" if first.where else ""
        said += f"; on {first.arguments}: {first.difference}"
        for names, what in (
            (self.unplaced, "could not be compared"),
            (self.unpaired, "ran only alone, or only together"),
        ):
            if names:
                said += f". Before it {what}: {', '.join(dict.fromkeys(names))}"
        return said

    def to_json(self) -> dict[str, Any]:
        """`line`, and for each operator its distance: `elements` of `of`, `ulps` and `absolute` (None: a NaN is among them)."""
        steps = []
        for s in self.steps:
            d = s.difference
            far = (0, 0, 0, 0.0) if d is None else (d.elements, d.of, d.ulps, d.absolute)
            distance = dict(zip(("elements", "of", "ulps", "absolute"), far, strict=True))
            steps.append({"operator": s.operator, "layer": s.layer, "where": s.where, **distance})
        return {"line": self.line(), "steps": steps}


NOTHING = (
    "no row differs, operator by operator; if `bi-compile verify` finds that it does, the difference comes from the code that "
    "the compiler generates for several operators at once"
)


def bisect(
    fn: Function | str,
    inputs: Sequence[Any],
    batch_dims: int | Sequence[int | None] = 0,
    *,
    backend: str | None = None,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    time_limit: float = 120.0,
    progress: Progress = quiet,
) -> Bisection:
    """Find a batch in which a row differs from the row alone, and the first operator that makes it differ.

    Arguments as of `bi_compile.verify`. With a backend that uses Inductor the graph that Inductor would lower is run node by
    node; other code is recorded at the dispatcher.

    Raises:
        MeasureError: what cannot be compared, in one sentence.
    """
    case = Case(fn, inputs, batch_dims, backend)
    plan = make_plan(case.rows, seed, sizes, floating=case.floating)
    active: list[Recorder] = []
    with recompiling(), interpreting(lambda: active[-1] if active else None):
        mismatch = run(case, plan, time_limit, progress).mismatch
        if mismatch is None:
            return Bisection()
        recorded = []
        for batch in (Batch((mismatch.row,)), mismatch.batch):
            case(batch)  # compiled by now
            recorder = Recorder()
            active.append(recorder)
            # Dynamo calls no compiled code under a dispatch mode
            case(batch, recorder if backend is None else None)
            active.clear()
            recorded.append(recorder.calls)
    if not all(recorded):
        raise MeasureError(
            f"the backend {backend!r} hands no graph to Inductor, so there is none to run: leave backend out"
        )
    span = Span(len(mismatch.batch.rows), mismatch.place, 1)
    found = compare(recorded[0], recorded[1], [span])
    found.mismatch = mismatch
    return found


def compare(alone: list[Call], together: list[Call], spans: Sequence[Span]) -> Bisection:
    """Compare the row's part of each call's outputs, the two runs' calls being paired in order."""
    found = Bisection()
    names = [c.operator for c in alone], [c.operator for c in together]
    if names[0] == names[1]:
        blocks: Iterable[tuple[str, int, int, int, int]] = [("equal", 0, len(alone), 0, len(together))]
    else:
        blocks = difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes()
    for tag, i, i_end, j, j_end in blocks:
        if tag != "equal":
            found.unpaired += [c.operator for c in (*alone[i:i_end], *together[j:j_end])] if not found.first else []
            continue
        for a, b in zip(alone[i:i_end], together[j:j_end], strict=True):
            pairs = [_row(x, y, spans) for x, y in zip(a.outputs, b.outputs, strict=False)]
            placed = [p for p in pairs if p is not None]
            if len(placed) < max(len(a.outputs), len(b.outputs)) and found.first is None:
                found.unplaced.append(b.operator)
            if placed:
                differ = [d for d in (difference(*p) for p in placed) if d is not None]
                found.steps.append(Step(b.operator, b.layer, b.where, b.arguments, differ[0] if differ else None))
    return found


def _row(alone: Tensor, together: Tensor, spans: Sequence[Span]) -> tuple[Tensor, Tensor] | None:
    """The row's part of both, or None: the dimension that grew from the row's length to the batch's is the rows'."""
    if alone.dtype != together.dtype or alone.dim() != together.dim():
        return None
    grown = [d for d in range(alone.dim()) if alone.shape[d] != together.shape[d]]
    if not grown:
        return alone, together
    (dim, *others) = grown
    for span in spans if not others else ():
        each, rest = divmod(alone.shape[dim], span.length)
        if not rest and each * span.total == together.shape[dim]:
            return alone, together.narrow(dim, each * span.start, each * span.length)
    return None
