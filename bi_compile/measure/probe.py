"""Native operators measured on the device at hand: which of them vary with the batch, and what the audit does with that.

A file of `bi-compile probe` is read back through the option `probe`. It only takes away: an operator that was measured to
vary is no longer trusted. That none was found to vary proves nothing for other shapes, so it makes nothing trusted; it is
added to what the audit says of an operator about which nothing else is known.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..audit.report import Finding, Report
from ..audit.spec import Verdict
from ..errors import MeasureError, OptionError
from .plan import make_plan
from .progress import Progress, quiet
from .row_function import Case
from .verify import run

FORMAT = 1
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


def machine(device: str) -> dict[str, Any]:
    """What a measurement holds for: device, its name, and the versions of what computes there."""
    module = None if device == "cpu" else getattr(torch, device, None)
    if device != "cpu" and (module is None or not module.is_available()):
        raise MeasureError(f"there is no device {device!r} here: name one that torch can use, as in --device cpu")
    name = torch.backends.cpu.get_cpu_capability() if module is None else module.get_device_name()
    return {
        "device": device,
        "device_name": f"{platform.machine()} {name}" if module is None else name,
        "torch": str(torch.__version__),
    }


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


# -- reading back -----------------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Any]:
    """A probe file. Raises OptionError: it cannot be read, or is none."""
    try:
        data = json.loads(Path(path).read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        {k: data[k] for k in ("date", "device", "device_name", "torch", "operators")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"probe={str(path)!r} is no file of this version's `bi-compile probe` ({error}): make it again"
        ) from None
    return data  # type: ignore[no-any-return]


def stale(data: dict[str, Any]) -> str | None:
    """Why the file says nothing about this machine, or None."""
    try:
        here = machine(data["device"])
    except MeasureError as error:
        return str(error)
    differ = [f"{k} {data[k]!r} there and {here[k]!r} here" for k in here if data[k] != here[k]]
    return f"measured elsewhere ({'; '.join(differ)}): run `bi-compile probe` again" if differ else None


def apply(data: dict[str, Any], report: Report, graph: fx.Graph, native: bool) -> Report:
    """The audit's report with what was measured.

    native: whether the graph runs operator by operator. Otherwise a compiler makes code of its own of everything that is
        row-local by nature, which is not what was measured.
    """
    nodes = {node.name: node for node in graph.nodes}
    return dataclasses.replace(
        report, findings=tuple(_with(data, f, nodes.get(f.node), native) for f in report.findings)
    )


def _with(data: dict[str, Any], finding: Finding, node: fx.Node | None, native: bool) -> Finding:
    by_dtype = data["operators"].get(finding.operator)
    if by_dtype is None or node is None:
        return finding
    measured = [by_dtype[d] for d in sorted(_dtypes(node)) if d in by_dtype]
    mismatch = next((m for d in measured for m in d["mismatches"]), None)
    judged = (Verdict.TRUSTED, Verdict.UNPROVEN, *((Verdict.ROW_LOCAL,) if native else ()))
    if mismatch is not None and finding.verdict in judged:
        reason = f"measured to vary ({data['date']}, {data['device_name']}): {mismatch}"
        if finding.verdict is Verdict.TRUSTED:
            reason += f"; it was trusted because: {finding.reason}"
        return dataclasses.replace(finding, verdict=Verdict.VARIANT, reason=reason)
    if measured and finding.verdict is Verdict.UNPROVEN:
        seen = (
            f"; measured: no mismatch in {sum(d['rows'] for d in measured)} rows, which proves nothing for other shapes"
        )
        return dataclasses.replace(finding, reason=finding.reason + seen)
    return finding


def _dtypes(node: fx.Node) -> Iterator[str]:
    values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
    return (
        str(x.dtype).removeprefix("torch.") for x in dict.fromkeys(pytree.tree_leaves(values)) if isinstance(x, Tensor)
    )
