"""Measures docs/data/equal_answers.csv on this machine: `python docs/equal_answers.py`, a few minutes on two cores.

The questions of `bi-compile demo`: up to which token is an answer from a batch the same as the answer alone?
"""

from __future__ import annotations

import csv
import datetime
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bi_compile.demo.show import QUESTIONS
from bi_compile.measure.models import smollm2
from bi_compile.measure.process import run_module

TOKENS = 48
MODES: dict[str, dict[str, Any]] = {
    "vLLM": {},
    "with bi_ascend": {"compilation_config": {"custom_passes": ["bi_ascend"]}},
}


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    return run_module(
        "bi_compile.measure.requests", plan, 2400, OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )[0]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        chat = {
            "model": str(smollm2(Path(folder))),
            "dtype": "bfloat16",
            "questions": QUESTIONS,
            "batches": [len(QUESTIONS)],
            "tokens": TOKENS,
        }
        with ThreadPoolExecutor(len(MODES)) as pool:  # an engine of one thread for each of two cores
            plans = [chat | settings for settings in MODES.values()]
            found = list(pool.map(measure, plans))
    for mode, result in zip(MODES, found, strict=True):
        for position in range(TOKENS + 1):
            equal = (
                sum(n is None or n >= position for n in result[what]) for what in ("equal_tokens", "equal_logprobs")
            )
            rows.append([mode, position, *equal, len(QUESTIONS)])
    processor = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    said = (
        f"# SmolLM2-135M-Instruct, bfloat16, greedy: the {len(QUESTIONS)} questions of the demo one at a time and all at once, up to {TOKENS} "
        f"tokens: answers that are equal up to a token. vLLM {version('vllm-cpu')}, torch {torch.__version__}, "
        f"{processor}, one thread, {datetime.date.today()}, one run."
    )
    with (Path(__file__).parent / "data" / "equal_answers.csv").open("w", newline="") as file:
        file.write(f"{said}\n")
        csv.writer(file, lineterminator="\n").writerows(
            [["mode", "position", "equal_tokens", "equal_logprobs", "of"], *rows]
        )


if __name__ == "__main__":
    main()
