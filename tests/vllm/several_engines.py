"""Several vLLM engines in one process, started and ended in a given order.

    python tests/vllm/several_engines.py MODEL '{"steps": ["plain a", "key b", "end a"], "settings": {"dtype": "bfloat16"}}'

A step is a word and an engine's name: "plain" starts one without the key, "key" one with it, "warn" one with the key and
on_unproven="warn", "other" one with the key and other passes, "no-weights" one with the key whose model cannot be loaded, "split" a
plain one after VLLM_CPU_ATTN_SPLIT_KV=1 was set, "end" ends one. After every start each engine with the key answers its requests
together, and their logprobs are compared with those that they got alone when it had just started. Prints one line
`RESULT {"steps": [[step, what became of it, {engine: requests that differ}], …], "left": …}`: "left", what of ours is in the process
at the end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bi_compile.measure import requests

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
        steps = [engines.step(step) for step in plan["steps"]]
        print("RESULT", json.dumps({"steps": steps, "left": left()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
