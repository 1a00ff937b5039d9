"""Operators measured on the device at hand: which of them vary with the batch.

Native ones, and every pointwise operator of ATen both ways: called one by one, and as the code that the compiler makes of it
with the passes.

A file of `bi-compile probe` is read back through the option `probe`; `bi_compile.audit.measured` says what it does there.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..audit.measured import FORMAT, machine
from ..errors import MeasureError
from . import pointwise
from .plan import make_plan
from .pointwise import Pointwise
from .progress import Progress, quiet
from .row_function import Case
from .verify import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 8, 17, 32, 33, 64)
ROWS = 33
_A = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Probe:
    """One operator and the shapes that it is measured on. The first shape is a row's; the others have no batch dimension."""

    operator: str
    call: Callable[..., Any]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    batch: tuple[int, ...] = (0,)
    """Which of the operands have a batch dimension."""


_PRODUCTS = (((512,), (512, 1536)), ((1536,), (1536, 512)), ((1000,), (1000, 1000)))
_LINES = (((64,),), ((1000,),), ((4096,),))
_NORMS = tuple((line, line) for (line,) in _LINES)
_HEADS = tuple(((8, length, 64),) * 3 for length in (1, 33, 128))
#: for pointwise operators: below, at and above whole vectors
WIDTHS = (1, 2, 3, 5, 7, 8, 10, 13, 15, 16, 17, 21, 26, 31, 33, 40, pointwise.WIDE)
BATCHES = (1, 2, 7, 16, 33)


def probes() -> list[Probe]:
    """What is measured beside the pointwise operators of `pointwise.operators`."""
    return [
        Probe("aten.mm.default", _A.mm.default, _PRODUCTS),
        Probe("aten.addmm.default", lambda x, w: _A.addmm.default(w[0], x, w), _PRODUCTS),
        Probe("aten.linear.default", lambda x, w: _A.linear.default(x, w.t()), _PRODUCTS),
        Probe("aten.bmm.default", _A.bmm.default, (((33, 64), (64, 33)), ((1, 64), (64, 128))), (0, 1)),
        Probe("aten.sum.dim_IntList", lambda x: _A.sum.dim_IntList(x, [-1]), _LINES),
        Probe("aten.mean.dim", lambda x: _A.mean.dim(x, [-1]), _LINES),
        Probe("aten.var.correction", lambda x: _A.var.correction(x, [-1]), _LINES),
        Probe("aten.amax.default", lambda x: _A.amax.default(x, [-1]), _LINES),
        Probe("aten._softmax.default", lambda x: _A._softmax.default(x, -1, False), _LINES),
        Probe("aten._log_softmax.default", lambda x: _A._log_softmax.default(x, -1, False), _LINES),
        Probe("aten.logsumexp.default", lambda x: _A.logsumexp.default(x, [-1]), _LINES),
        Probe("aten.native_layer_norm.default", lambda x, w: _A.native_layer_norm.default(x, list(w.shape), w, None, 1e-5)[0], _NORMS),
        Probe("aten.rms_norm.default", lambda x, w: _A.rms_norm.default(x, list(w.shape), w, 1e-6), _NORMS),
        Probe("aten.scaled_dot_product_attention.default", _A.scaled_dot_product_attention.default, _HEADS, (0, 1, 2)),
        Probe("aten.cumsum.default", lambda x: _A.cumsum.default(x, -1), _LINES),
        Probe("aten.cumprod.default", lambda x: _A.cumprod.default(x, -1), _LINES),
        Probe("aten.topk.default", lambda x: _A.topk.default(x, 5), _LINES),
        Probe("aten.sort.default", lambda x: _A.sort.default(x, -1), _LINES),
        Probe("aten.argmax.default", lambda x: _A.argmax.default(x, -1), _LINES),
        Probe("aten.embedding.default", lambda x, w: _A.embedding.default(w, x.abs().float().nan_to_num(0).clamp(max=9).long()), (((64,), (10, 128)),)),
    ]  # fmt: skip


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(
    device: str = "cpu",
    seed: int = 0,
    time_limit: float = 600.0,
    operators: list[str] | None = None,
    progress: Progress = quiet,
    compiled: bool = True,
) -> dict[str, Any]:
    """The content of a probe file: what was measured, for each operator and dtype.

    operators: measure these alone (`ns.packet.overload`). time_limit: seconds for the native ones, shared out equally.
    compiled: measure the pointwise operators as compiled code too, which takes a C++ compiler some minutes more.

    Raises:
        MeasureError: there is no such device, or no such operator among those that are measured.
    """
    here = machine(device)
    wanted, points = probes(), pointwise.operators()
    if operators is not None:
        names = [*(p.operator for p in wanted), *(p.name for p in points)]
        if unknown := set(operators) - set(names):
            raise MeasureError(f"{', '.join(sorted(unknown))} is not among what is measured: {', '.join(names)}")
        wanted = [p for p in wanted if p.operator in operators]
        points = [p for p in points if p.name in operators]
    found: dict[str, Any] = {}
    threads = sorted({1, torch.get_num_threads()}) if device == "cpu" else ()
    several = len(wanted) + len(points)
    each = time_limit / max(sum(len(p.shapes) * len(DTYPES) for p in wanted) + len(points) * len(DTYPES), 1)
    for i, p in enumerate(wanted):
        progress(p.operator, i / several)
        found[p.operator] = {_name(d): _of(p, d, device, seed, each, threads) for d in DTYPES}
    stop = time.monotonic() + each * len(points) * len(DTYPES)
    for i, point in enumerate(points):
        progress(point.name, (len(wanted) + i) / several)
        by_dtype = {_name(d): _of_pointwise(point, d, device, time.monotonic() < stop) for d in DTYPES}
        found[point.name] = {name: measured for name, measured in by_dtype.items() if measured is not None}
    made: dict[str, Any] = {}
    for dtype in DTYPES if compiled and points else ():
        progress(f"compiled, {_name(dtype)}", 1.0)
        with torch.no_grad():
            for name, where in pointwise.compiled(points, dtype, WIDTHS[:-1], BATCHES, device=device).items():
                if where is None or not where.startswith("refused"):
                    made.setdefault(name, {})[_name(dtype)] = _measured(WIDTHS[:-1], where, layouts=2)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "date": date,
        **here,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "operators": found,
        "compiled": made,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measured(widths: Sequence[int], where: str | None, layouts: int = 3) -> dict[str, Any]:
    places = sum(len({0, n // 2, n - 1}) for n in BATCHES) * len(widths) * layouts
    return {"rows": places, "batches": places, "batches_left": 0, "mismatches": [] if where is None else [where]}


def _of_pointwise(p: Pointwise, dtype: torch.dtype, device: str, there_is_time: bool) -> dict[str, Any] | None:
    """None where the operator does not take this dtype."""
    if not there_is_time:
        return _measured(WIDTHS, None) | {"rows": 0, "batches": 0, "batches_left": _measured(WIDTHS, None)["batches"]}
    where = pointwise.eager(p, dtype, WIDTHS, BATCHES, device)
    return None if where is not None and where.startswith("refused") else _measured(WIDTHS, where)


def _of(p: Probe, dtype: torch.dtype, device: str, seed: int, limit: float, threads: Any) -> dict[str, Any]:
    """Rows and batches that were compared, and the counterexamples: for each family of shapes at most one."""
    rows = batches = left = 0
    mismatches = []
    for shapes in p.shapes:
        generator = torch.Generator().manual_seed(seed)
        made = [
            torch.randn(*((ROWS,) if i in p.batch else ()), *shape, generator=generator).to(device, dtype)
            for i, shape in enumerate(shapes)
        ]
        case = Case(p.call, made, [0 if i in p.batch else None for i in range(len(made))])
        evidence = run(case, make_plan(ROWS, seed, SIZES, threads=threads), limit)
        rows, batches = rows + evidence.rows.total(), batches + evidence.batches.total()
        left += evidence.left if evidence.equal else 0
        if evidence.mismatch is not None:
            mismatches.append(f"operands {[list(x.shape[1:]) for x in made]}: {evidence.mismatch}")
    return {"rows": rows, "batches": batches, "batches_left": left, "mismatches": mismatches}
