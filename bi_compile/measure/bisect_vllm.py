"""The first operator whose row differs on a vLLM engine: requests alone and together, model step by model step.

    python -m bi_compile.measure.bisect_vllm '{"model": "DIR"}'

The engine runs in a process of its own with its compiled graphs interpreted (`record.interpreting`); what it leaves
uncompiled (lm_head, the sampler) is recorded at the dispatcher. Prints one line `RESULT {json}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MeasureError
from .bisect import Bisection, Span, Step, compare
from .bits import Difference
from .record import Call, Recorder, interpreting
from .requests import settled
from .verify_vllm import PLAN, Requests, batches, check, in_a_process, main, start

#: nothing that was compiled earlier, and no step that is prepared beside another
ENVIRONMENT = {"VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_USE_AOT_COMPILE": "0"}
FEW = {"sizes": [2, 8], "requests": 8}


def bisect(model: Path, **plan: Any) -> tuple[dict[str, Any] | None, Bisection]:
    """(the mismatch or None, where it begins); arguments and errors as `engine.verify`."""
    check(model, plan)
    result = in_a_process(__name__, {"model": str(model), **FEW, **plan}, **ENVIRONMENT)
    return result["mismatch"], Bisection(**{**result["found"], "steps": [_step(s) for s in result["found"]["steps"]]})


def _step(data: dict[str, Any]) -> Step:
    found = data["difference"]
    return Step(**{**data, "difference": Difference(**{**found, "index": tuple(found["index"])}) if found else None})


@dataclasses.dataclass
class ModelStep:
    """One step of the model: what it called, and how many tokens of which request it took, in order."""

    calls: list[Call]
    tokens: dict[str, int]


class Tap:
    """Records the steps of an engine's model runner while `on`."""

    def __init__(self, llm: Any) -> None:
        self.runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.names = {id(module): name for name, module in self.runner.model.named_modules()}
        self.recorder: Recorder | None = None
        self.steps: list[ModelStep] = []

    @contextlib.contextmanager
    def on(self) -> Iterator[list[ModelStep]]:
        execute, sample = self.runner.execute_model, self.runner.sample_tokens
        self.steps = []

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            with self._recording() as calls:
                result = execute(scheduled, *args, **kwargs)
            counts = scheduled.num_scheduled_tokens
            self.steps.append(ModelStep(calls, {r: counts[r] for r in self.runner.input_batch.req_ids if r in counts}))
            return result

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            with self._recording() as calls:
                result = sample(*args, **kwargs)
            self.steps[-1].calls += calls
            return result

        self.runner.execute_model, self.runner.sample_tokens = execute_model, sample_tokens
        try:
            yield self.steps
        finally:
            del self.runner.execute_model, self.runner.sample_tokens

    @contextlib.contextmanager
    def _recording(self) -> Iterator[list[Call]]:
        self.recorder = Recorder(self.names, only_modules=True)
        try:
            with self.recorder:
                yield self.recorder.calls
        finally:
            self.recorder = None


def _spans(alone: ModelStep, together: ModelStep, request: str) -> list[Span]:
    """Where the request's tokens are, and where its one row is in what holds one for each request."""
    (length,) = alone.tokens.values()
    if together.tokens[request] != length:
        raise MeasureError(
            f"a prompt is cut differently alone ({length} tokens) and together ({together.tokens[request]}), so the steps cannot "
            "be compared: take fewer or shorter prompts"
        )
    requests = list(together.tokens)
    at = requests.index(request)
    counts = list(together.tokens.values())
    return [Span(sum(counts), sum(counts[:at]), length), Span(len(requests), at, 1)]


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan in this process. Raises MeasureError."""
    own, settings = settled(plan, PLAN)
    taps: list[Tap] = []
    with interpreting(lambda: taps[0].recorder if taps else None):
        asked = Requests(start({"async_scheduling": False, **settings}), own)
        mismatch = next((m for m in (asked.mismatch(batch) for _, batch in batches(own)) if m is not None), None)
        if mismatch is None:
            return {"mismatch": None, "found": dataclasses.asdict(Bisection())}
        mismatch = asked.smaller(mismatch, float("inf"))
        taps.append(Tap(asked.llm))
        with taps[0].on() as alone:
            asked.together([mismatch["request"]])
        with taps[0].on() as together:
            asked.together(mismatch["batch"])
        return {"mismatch": mismatch, "found": dataclasses.asdict(first_of(alone, together, mismatch["place"]))}


def first_of(alone: list[ModelStep], together: list[ModelStep], place: int) -> Bisection:
    """The comparison of the first model step in which something differs, else of the last."""
    order = list(dict.fromkeys(request for step in together for request in step.tokens))
    request = order[place]
    found = Bisection()
    for i, (a, b) in enumerate(zip(alone, (step for step in together if request in step.tokens), strict=True)):
        found = compare(a.calls, b.calls, _spans(a, b, request))
        found.where = f"model step {i} of the request, on {sum(b.tokens.values())} tokens in all"
        if found.first is not None:
            break
    return found


if __name__ == "__main__":
    main(run)
