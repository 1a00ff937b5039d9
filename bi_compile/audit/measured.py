"""What `bi-compile probe` measured, in the audit.

A probe file only takes away: an operator that was measured to vary is no longer trusted. That none was found to vary proves
nothing for other shapes, so it makes nothing trusted; it is added to what the audit says of an operator about which nothing
else is known.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..errors import MeasureError, OptionError
from .report import Finding, Report
from .spec import Verdict

FORMAT = 2
"""The version of a probe file's form."""


def machine(device: str) -> dict[str, Any]:
    """What a measurement holds for: device, its name, and the versions of what computes there."""
    module = None if device == "cpu" else getattr(torch, device, None)
    if device != "cpu" and (module is None or not module.is_available()):
        raise MeasureError(f"torch has no device {device!r} here: name one that it can use, as in --device cpu")
    name = torch.backends.cpu.get_cpu_capability() if module is None else module.get_device_name()
    return {
        "device": device,
        "device_name": f"{platform.machine()} {name}" if module is None else name,
        "torch": str(torch.__version__),
    }


def read(path: str | Path) -> dict[str, Any]:
    """A probe file. Raises OptionError: it cannot be read, or is none."""
    try:
        data = json.loads(Path(path).read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        {k: data[k] for k in ("date", "device", "device_name", "torch", "operators", "compiled")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"probe={str(path)!r} is not a file of this version's `bi-compile probe` ({error}): make it again"
        ) from None
    return data


def stale(data: Mapping[str, Any]) -> str | None:
    """Why the file says nothing about this machine, or None."""
    try:
        here = machine(data["device"])
    except MeasureError as error:
        return str(error)
    differ = [f"{k} {data[k]!r} there and {here[k]!r} here" for k in here if data[k] != here[k]]
    return f"measured elsewhere ({'; '.join(differ)}): run `bi-compile probe` again" if differ else None


def apply(data: Mapping[str, Any], report: Report, graph: fx.Graph, native: bool) -> Report:
    """The audit's report with what was measured.

    native: whether the graph runs operator by operator. Otherwise a compiler makes code of its own of everything that is
        row-local by nature, which was measured by itself.
    """
    nodes = {node.name: node for node in graph.nodes}
    return dataclasses.replace(
        report, findings=tuple(_with(data, f, nodes.get(f.node), native) for f in report.findings)
    )


def _with(data: Mapping[str, Any], finding: Finding, node: fx.Node | None, native: bool) -> Finding:
    generated = finding.verdict is Verdict.ROW_LOCAL and not native
    by_dtype = data["compiled" if generated else "operators"].get(finding.operator)
    if by_dtype is None or node is None:
        return finding
    measured = [by_dtype[d] for d in sorted(_dtypes(node)) if d in by_dtype]
    mismatch = next((m for d in measured for m in d["mismatches"]), None)
    if mismatch is not None and finding.verdict in (Verdict.TRUSTED, Verdict.UNPROVEN, Verdict.ROW_LOCAL):
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
