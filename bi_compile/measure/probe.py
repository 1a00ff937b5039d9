"""Native operators measured on the device at hand: which of them vary with the batch.

A file of `bi-compile probe` is read back through the option `probe`; `bi_compile.audit.measured` says what it does there.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

import torch

from ..audit.measured import FORMAT, machine
from ..errors import MeasureError
from .plan import make_plan
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


def _unary(name: str) -> Probe:
    return Probe(f"aten.{name}.default", getattr(_A, name).default, (((1,),), ((64,),), ((1000,),)))


_PRODUCTS = (((512,), (512, 1536)), ((1536,), (1536, 512)), ((1000,), (1000, 1000)))
_LINES = (((64,),), ((1000,),), ((4096,),))
_NORMS = tuple((line, line) for (line,) in _LINES)
_HEADS = tuple(((8, length, 64),) * 3 for length in (1, 33, 128))
POINTWISE = (
    "exp log sqrt rsqrt reciprocal sin cos tanh sigmoid erf log1p expm1 silu gelu relu abs neg softplus mish hardswish elu"
).split()


def probes() -> list[Probe]:
    """What is measured."""
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
        Probe("aten.add.Tensor", lambda x: _A.add.Tensor(x, x), _LINES),
        Probe("aten.mul.Tensor", lambda x: _A.mul.Tensor(x, x), _LINES),
        Probe("aten.div.Tensor", lambda x: _A.div.Tensor(x, x.abs() + 1), _LINES),
        Probe("aten.pow.Tensor_Scalar", lambda x: _A.pow.Tensor_Scalar(x.abs(), 1.5), _LINES),
        *map(_unary, POINTWISE),
    ]  # fmt: skip


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(
    device: str = "cpu",
    seed: int = 0,
    time_limit: float = 600.0,
    operators: list[str] | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """The content of a probe file: what was measured, for each operator and dtype.

    operators: measure these alone (`ns.packet.overload`). time_limit: seconds, shared out equally.

    Raises:
        MeasureError: there is no such device, or no such operator among those that are measured.
    """
    here = machine(device)
    wanted = probes()
    if operators is not None:
        unknown = set(operators) - {p.operator for p in wanted}
        if unknown:
            known = ", ".join(p.operator for p in wanted)
            raise MeasureError(f"{', '.join(sorted(unknown))} is not among what is measured: {known}")
        wanted = [p for p in wanted if p.operator in operators]
    found: dict[str, Any] = {}
    threads = sorted({1, torch.get_num_threads()}) if device == "cpu" else ()
    each = time_limit / sum(len(p.shapes) * len(DTYPES) for p in wanted)
    for i, p in enumerate(wanted):
        progress(p.operator, i / len(wanted))
        found[p.operator] = {str(d).removeprefix("torch."): _of(p, d, device, seed, each, threads) for d in DTYPES}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "date": date,
        **here,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "operators": found,
    }


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
