"""How fast a vLLM engine serves, and whether its bits follow the batch.

    python -m bi_compile.measure.serving '{"model": "DIR", "compilation_config": {"custom_passes": ["bi_ascend"]}}'

Prints one line `RESULT {json}`: "differ", of 16 requests how many have other logprobs among 112 than alone; "seconds", for each of the "cases"
the time of each round, the mean of as many calls as make up "turn" seconds, all on the CPU that was the fastest when the turn began; "start", the seconds
until the engine stands; "peak", the most GiB of a GPU that PyTorch in this process held at once, keys and values included (null: it held none). A
case is a number of requests, the tokens of each prompt, and the tokens that each asks for. With "turns" each round waits for its turn (see `process.take_turns`). "environment" is set before vLLM is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from .process import fastest_cpu, wait_for_turn
from .requests import bits, engine, greedy, prompts, settled

CASES: dict[str, tuple[int, int, int]] = {
    **{f"{n} at once": (n, 256, 128) for n in (1, 16, 64, 256)},
    **{f"{n} prompts of 256": (n, 256, 1) for n in (16, 64)},
    "one prompt of 2048": (1, 2048, 1),
}
#: keys of a plan that are not vLLM's
PLAN: dict[str, Any] = {"cases": CASES, "rounds": 16, "turn": 0.3, "turns": False, "environment": {}}


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan: keys of `PLAN`, the rest goes to `vllm.LLM`."""
    own, settings = settled(plan, PLAN)
    os.environ.update(own["environment"])
    import torch
    from vllm import SamplingParams

    began = time.perf_counter()
    llm = engine({"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192, **settings})
    result: dict[str, Any] = {"start": time.perf_counter() - began}

    asked, few = prompts({"requests": 112, "prompt": [10, 400], "seed": 0}), greedy(32)
    alone = [llm.generate([p], few, use_tqdm=False)[0].outputs[0] for p in asked[:16]]
    together = [output.outputs[0] for output in llm.generate(asked, few, use_tqdm=False)]
    result["differ"] = sum(bits(a) != bits(b) for a, b in zip(alone, together, strict=False))

    given = {
        name: (
            prompts({"requests": requests, "prompt": [prompt, prompt], "seed": 1}),
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
        )
        for name, (requests, prompt, tokens) in own["cases"].items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in given}
    for _ in range(own["rounds"] + 1):
        for name, (asked, sampling) in given.items():
            if own["turns"]:
                wait_for_turn()
            with fastest_cpu():
                start, calls = time.perf_counter(), 0
                while calls == 0 or time.perf_counter() - start < own["turn"]:
                    llm.generate(asked, sampling, use_tqdm=False)
                    calls += 1
                seconds[name].append((time.perf_counter() - start) / calls)
    result["seconds"] = {name: found[1:] for name, found in seconds.items()}  # the first round warms up
    # with several ranks the workers are other processes
    result["peak"] = torch.cuda.max_memory_allocated() / 2**30 or None
    return result


if __name__ == "__main__":
    print("RESULT", json.dumps(run(json.loads(sys.argv[1]))), flush=True)
