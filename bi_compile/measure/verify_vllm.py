"""Requests alone and together on one vLLM engine, in several sizes and orders, up to the first mismatch, made small.

    python -m bi_compile.measure.verify_vllm '{"model": "DIR", "compilation_config": {"custom_passes": ["bi_ascend"]}}'

Prints one line `RESULT {json}`; `verify` runs that in a process of its own and reads it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import HostError, MeasureError, ProcessError
from . import requests
from .bits import difference
from .process import ProcessFailed, run_module

#: keys of a plan that are not vLLM's. only: {"request": i, "batch": [i, j, …]}, a counterexample that is run again.
#: prompts: texts, or lists of token ids, in place of `requests` random ones.
PLAN: dict[str, Any] = {
    "prompts": None,
    "requests": 16,
    "sizes": [2, 3, 5, 8, 16],
    "prompt": [5, 60],
    "tokens": 8,
    "seed": 0,
    "time_limit": 60.0,
    "only": None,
}


def verify(model: Path, **plan: Any) -> dict[str, Any]:
    """Run a plan (keys of `PLAN`, the rest goes to `vllm.LLM`) in a process of its own.

    Returns: "batches" that ran and "rows" compared, "left" that did not run, "seconds" without the engine's start, and
    "mismatch": None or the smallest that was found.

    Raises:
        MeasureError: prefix caching is on, the engine is not deterministic, or there is no model.
        ProcessError: the engine's process failed.
        HostError: there is no vLLM.
    """
    check(model, plan)
    return in_a_process(__name__, {"model": str(model), **plan})


def check(model: Path, settings: dict[str, Any]) -> None:
    """Raise MeasureError or HostError for what can be seen before an engine starts."""
    if find_spec("vllm") is None:
        raise HostError("an engine needs vLLM, which cannot be imported: pip install vllm")
    if not (model / "config.json").exists():
        raise MeasureError(f"{model} holds no model (config.json is missing): name the folder of one")
    if settings.get("enable_prefix_caching"):
        raise MeasureError(CACHING)


def read(counterexample: Path) -> tuple[Path | None, dict[str, Any]]:
    """The model and the plan of a counterexample that the command wrote; without a model where it has a base_url. Raises MeasureError."""
    try:
        plan = json.loads(counterexample.read_text())
        model = plan.pop("model", None) if "base_url" in plan else plan.pop("model")
        return model if model is None else Path(model), {**plan, "only": plan["only"]}
    except (ValueError, KeyError, AttributeError) as error:
        raise MeasureError(
            f"{counterexample} is not a counterexample ({error!r}): name a model's folder, or a file that `bi-compile verify vllm` wrote"
        ) from None


def read_prompts(file: Path) -> list[str | list[int]]:
    """A prompt from each line that is not empty: the text itself, or, where the name ends in .jsonl, a JSON string, a list of
    token ids, or an object whose "prompt" is one of these. Raises MeasureError."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        found = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise MeasureError(f"{file} cannot be read ({error}): name a file with a prompt on each line") from None
    prompts: list[Any] = [p.get("prompt") if isinstance(p, dict) else p for p in found]
    for i, p in enumerate(prompts):
        tokens = isinstance(p, list) and bool(p) and all(type(t) is int for t in p)
        if not tokens and not (isinstance(p, str) and p):
            raise MeasureError(
                f'{file}, prompt {i + 1}: a text, a list of token ids, or {{"prompt": one of these}}; got {p!r}'
            )
    if not prompts:
        raise MeasureError(f"{file} holds no prompt: write one on each line")
    return prompts


CACHING = (
    "prefix caching is on: the second run of a request would read the keys and values of its first, and a mismatch would "
    "stay hidden; leave out enable_prefix_caching"
)


def in_a_process(module: str, plan: dict[str, Any], **environment: str) -> dict[str, Any]:
    """The result of `python -m module plan`. Raises MeasureError: it was refused there; ProcessError: the process failed."""
    try:
        result, _ = run_module(module, plan, 1200, **environment)
    except ProcessFailed as error:
        raise ProcessError(f"the engine's process failed:\n{error}") from None
    if "refused" in result:
        raise MeasureError(result["refused"])
    return result


def start(settings: dict[str, Any]) -> Any:
    """The engine. Raises MeasureError: it reuses prefixes."""
    llm = requests.engine(settings)
    if llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
        raise MeasureError(CACHING)
    return llm


class Requests:
    """Requests on one engine; each alone, once."""

    def __init__(self, llm: Any, own: dict[str, Any]) -> None:
        self.llm = llm
        given = own.get("prompts")
        self.prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in given or ()] or requests.prompts(
            own
        )
        self.sampling = requests.greedy(own["tokens"])
        self._alone: dict[int, Any] = {}

    def together(self, batch: list[int]) -> list[Any]:
        """What each request of the batch gets: for each token the logprobs of the likeliest."""
        found = self.llm.generate([self.prompts[i] for i in batch], self.sampling, use_tqdm=False)
        return [requests.bits(o.outputs[0]) for o in found]

    def alone(self, request: int) -> Any:
        if request not in self._alone:
            self._alone[request] = self.together([request])[0]
        return self._alone[request]

    def mismatch(self, batch: list[int], only: int | None = None) -> dict[str, Any] | None:
        """The first request of the batch (or the one named) that gets other bits than alone."""
        for place, (request, got) in enumerate(zip(batch, self.together(batch), strict=True)):
            if only in (None, request) and got != self.alone(request):
                return {"request": request, "batch": batch, "place": place, **_describe(self.alone(request), got)}
        return None

    def smaller(self, found: dict[str, Any], deadline: float) -> dict[str, Any]:
        """The same request among as few others as still make it differ: halves of them are left out, then single ones."""
        request, part = found["request"], len(found["batch"]) // 2
        while part and time.monotonic() < deadline:
            others = [i for i in found["batch"] if i != request]
            for at in range(0, len(others), part):
                gone = set(others[at : at + part])
                smaller = self.mismatch([i for i in found["batch"] if i not in gone], request)
                if smaller is not None:
                    found = smaller
                    break
            else:
                part //= 2
            part = min(part, len(found["batch"]) - 1)
        return found


def _describe(alone: Any, together: Any) -> dict[str, Any]:
    step = next(i for i, (a, b) in enumerate(zip(alone, together, strict=True)) if a != b)
    a, b = dict(alone[step]), dict(together[step])
    tokens = [token for token in a if token in b]
    found = difference(torch.tensor([a[t] for t in tokens]), torch.tensor([b[t] for t in tokens]))
    return {
        "step": step,
        "other_token": alone[step][0][0] != together[step][0][0],
        "difference": "other tokens are the likeliest" if found is None else str(found),
    }


def sentence(mismatch: dict[str, Any]) -> str:
    """A mismatch in words."""
    others = [i for i in mismatch["batch"] if i != mismatch["request"]]
    token = " with another token" if mismatch["other_token"] else ""
    return (
        f"request {mismatch['request']} among {len(others)} others ({', '.join(map(str, others))}) differs from itself alone at "
        f"token {mismatch['step']}{token}: logprobs, {mismatch['difference']}"
    )


def line(result: dict[str, Any]) -> str:
    """What a run found, in words."""
    if result["mismatch"] is not None:
        return f"not batch-invariant: {sentence(result['mismatch'])}"
    cut = f"; time limit reached: {result['left']} batches did not run" if result["left"] else ""
    if not result["rows"]:
        return f"nothing was compared ({result['seconds']:.1f} s){cut}; raise the time limit"
    orders = ", ".join(f"{n} {order}" for order, n in result["batches"].items())
    return f"no mismatch: {result['rows']} requests in {sum(result['batches'].values())} batches ({orders}; {result['seconds']:.1f} s){cut}"


def batches(own: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """(order, requests): every request in batches of each size, in the order given, reversed and shuffled."""
    count, rng = len(own["prompts"] or ()) or own["requests"], random.Random(own["seed"])
    orders = {
        "given": list(range(count)),
        "reversed": list(range(count))[::-1],
        "shuffled": rng.sample(range(count), count),
    }
    for name, order in orders.items():
        for size in own["sizes"]:
            for i in range(0, count, size):
                yield name, order[i : i + size]


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan in this process. Raises MeasureError."""
    own, settings = requests.settled(plan, PLAN)
    if any(isinstance(p, str) for p in own["prompts"] or ()):
        settings = {"skip_tokenizer_init": False, **settings}
    return compare(Requests(start(settings), own), own, time.monotonic())


def compare(asked: Requests, own: dict[str, Any], began: float) -> dict[str, Any]:
    """Each request alone, then in the batches of a plan. Raises MeasureError: the answers to one request alone differ."""
    deadline = began + own["time_limit"]
    if own["only"]:
        batch, request = own["only"]["batch"], own["only"]["request"]
        found = asked.mismatch(batch, request)
        return {"batches": {"given": 1}, "rows": 1, "left": 0, "mismatch": found, "seconds": time.monotonic() - began}
    if asked.together([0])[0] != asked.alone(0):
        raise MeasureError("not deterministic: request 0 alone got different logprobs the second time")
    result: dict[str, Any] = {"batches": {}, "rows": 0, "left": 0, "mismatch": None}
    for order, batch in batches(own):
        if result["mismatch"] is not None or time.monotonic() > deadline:
            result["left"] += 1
            continue
        result["batches"][order] = result["batches"].get(order, 0) + 1
        result["rows"] += len(batch)
        found = asked.mismatch(batch)
        if found is not None:
            result["mismatch"] = asked.smaller(found, time.monotonic() + own["time_limit"])
    return {**result, "seconds": time.monotonic() - began}


def main(measure: Any) -> None:
    """Print the RESULT line of `measure(plan)`, the plan being the first argument; a refusal is a result too."""
    try:
        result = measure(json.loads(sys.argv[1]))
    except MeasureError as error:
        result = {"refused": str(error)}
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main(run)
