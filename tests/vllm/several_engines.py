"""Several vLLM engines in one process, started and ended in a given order.

    python tests/vllm/several_engines.py MODEL '{"steps": ["plain a", "key b", "end a"], "settings": {"dtype": "bfloat16"}}'

A step is a word and an engine's name: "plain" starts one without the key, "key" one with it, "warn" one with the key and
on_unproven="warn", "other" one with the key and other passes, "no-weights" one with the key whose model cannot be loaded, "split" a
plain one after VLLM_CPU_ATTN_SPLIT_KV=1 was set, "end" ends one. After every start each engine with the key answers its requests
together, and their logprobs are compared with those that they got alone when it had just started. Prints one line
`RESULT {"steps": [[step, what became of it, {engine: requests that differ}], …], "left": …}`: "left", what of ours is in the process
at the end.

    python tests/vllm/several_engines.py MODEL '{"tour": 3, "settings": {"dtype": "bfloat16", "enforce_eager": true}}'

takes every order in which up to so many engines, with the key and without it, can be started, refused and ended: each start, each
refusal and each end from each row of living engines (89 steps and 39 starts with three, 28 and 12 with two; some 10 s of one core for each start).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bi_compile.measure import process, requests

KEY: dict[str, Any] = {"compilation_config": {"custom_passes": ["bi_ascend"]}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "split": {},
    "key": KEY,
    "warn": KEY | {"additional_config": {"bi_compile": {"on_unproven": "warn"}}},
    "other": {"compilation_config": {"custom_passes": ["matmul", "softmax"]}},
    "no-weights": KEY,
}
SMALL = {"kv_cache_memory_bytes": 2**26}
ASKED = {"requests": 37, "prompt": [5, 300], "seed": 0}


def tour(most: int) -> list[str]:
    """Steps that take every start, refusal and end from every row of up to `most` living engines, the oldest first."""
    living: tuple[str, ...] = ()
    left = {
        (row, event)
        for n in range(most + 1)
        for row in itertools.product("kp", repeat=n)
        for event in _events(row, most)
    }
    steps: list[str] = []
    names: list[str] = []
    fresh = itertools.count()
    while left:
        for event in _way(living, left, most):
            left.discard((living, event))
            kind, at = event
            if kind == "end":
                steps.append(f"end {names.pop(at)}")
            else:
                steps.append(f"{kind} e{next(fresh)}")
                names += [steps[-1].split()[1]] * (kind in ("key", "plain"))
            living = _after(living, event)
    return steps + [f"end {name}" for name in names]


Event = tuple[str, int]


def _events(row: tuple[str, ...], most: int) -> list[Event]:
    starts = ("key", "plain", "no-weights", "split") if len(row) < most else ()
    return [*((kind, 0) for kind in starts if kind != "split" or "k" in row), *(("end", i) for i in range(len(row)))]


def _after(row: tuple[str, ...], event: Event) -> tuple[str, ...]:
    kind, at = event
    return row[:at] + row[at + 1 :] if kind == "end" else row + {"key": ("k",), "plain": ("p",)}.get(kind, ())


def _way(row: tuple[str, ...], left: set[tuple[tuple[str, ...], Event]], most: int) -> list[Event]:
    """The shortest way from `row` that ends with an event of `left`."""
    ways: list[tuple[tuple[str, ...], list[Event]]] = [(row, [])]
    for here, way in ways:  # grows while it is read
        for event in _events(here, most):
            if (here, event) in left:
                return [*way, event]
            ways.append((_after(here, event), [*way, event]))
    raise AssertionError(left)


class Engines:
    def __init__(self, model: Path, settings: dict[str, Any], empty: Path) -> None:
        self.model, self.settings, self.empty = model, settings, empty
        self.living: dict[str, Any] = {}
        self.alone: dict[str, Any] = {}
        self.prompts, self.sampling = requests.prompts(ASKED), requests.greedy(2)

    def step(self, step: str) -> list[Any]:
        word, _, name = step.partition(" ")
        if word == "end":
            del self.living[name]
            self.alone.pop(name, None)
            gc.collect()
            # vLLM's process groups are gone with it, for all engines of the process, until the next one starts
            return [step, "ended", {}]
        return [step, self._start(word, name), {name: self._differ(name) for name in self.alone}]

    def _start(self, word: str, name: str) -> str:
        model = self.empty if word == "no-weights" else self.model
        changed = {"VLLM_CPU_ATTN_SPLIT_KV": "1"} if word == "split" else {}
        try:
            with _environment(changed):
                self.living[name] = requests.engine({"model": str(model), **SMALL, **self.settings, **KINDS[word]})
        except Exception as error:
            return f"refused: {type(error).__name__}: {error}"
        if word not in ("plain", "split"):
            self.alone[name] = [bits for p in self.prompts for bits in self._answers(name, [p])]
        return "started"

    def _answers(self, name: str, prompts: list[Any]) -> list[Any]:
        outputs = self.living[name].generate(prompts, self.sampling, use_tqdm=False)
        return [requests.bits(o.outputs[0]) for o in outputs]

    def _differ(self, name: str) -> int:
        return sum(a != b for a, b in zip(self.alone[name], self._answers(name, self.prompts), strict=True))


@contextlib.contextmanager
def _environment(changed: dict[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def left() -> dict[str, Any]:
    """What of ours is in the process."""
    from vllm import envs
    from vllm.model_executor.layers import utils

    from bi_compile import eager

    return {
        "split_kv": envs.VLLM_CPU_ATTN_SPLIT_KV,
        "linear": utils.dispatch_cpu_unquantized_gemm.__module__,
        "fallbacks": len(eager._installed),
    }


def main(model: str, plan: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(Path(model) / "config.json", folder)
        engines = Engines(Path(model), plan["settings"], Path(folder))
        steps = []
        for step in plan["steps"] if "steps" in plan else tour(plan["tour"]):
            steps.append(engines.step(step))
            print("STEP", len(steps), json.dumps(steps[-1]), flush=True)
        print("RESULT", json.dumps({"steps": steps, "left": left()}), flush=True)


if __name__ == "__main__":
    os.environ.update({name: value for name, value in process.ENVIRONMENT.items() if name not in os.environ})
    main(sys.argv[1], json.loads(sys.argv[2]))
