"""Rollout and trainer: are the logprobs that vLLM served those that transformers' model computes of the same tokens?

    python -m bi_compile.measure.parity '{"model": "DIR", "dtype": "bfloat16"}'

vLLM with the pass answers random prompts together and gives the logprobs of the prompts' tokens and of its own. The same
weights in transformers then read each sequence alone: compiled by the backend `bi_ascend`, as it is under `invariant()`, and
so with gradients. Prints one line `RESULT {json}`: how many logprobs there are, and how many are equal to the bit for each.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .requests import engine, prompts

#: keys of a plan that are not vLLM's
PLAN: dict[str, Any] = {"requests": 5, "prompt": [5, 300], "tokens": 16, "seed": 0}


def rollout(plan: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """For each request its tokens, and the logprobs of all but the first."""
    from vllm import SamplingParams

    own = {**PLAN, **{k: v for k, v in plan.items() if k in PLAN}}
    settings = {k: v for k, v in plan.items() if k not in PLAN}
    llm = engine({"compilation_config": {"custom_passes": ["bi_ascend"]}, **settings})
    sampling = SamplingParams(
        temperature=0, max_tokens=own["tokens"], logprobs=1, prompt_logprobs=1, detokenize=False, ignore_eos=True
    )
    result = []
    for output in llm.generate(prompts(own), sampling, use_tqdm=False):
        (answer,) = output.outputs
        tokens = [*output.prompt_token_ids, *answer.token_ids]
        steps = [*output.prompt_logprobs[1:], *answer.logprobs]
        result.append((tokens, [step[token].logprob for step, token in zip(steps, tokens[1:], strict=True)]))
    return result


def trainers(model: Any) -> dict[str, Any]:
    """The ways to compute the logprobs of a sequence: a name, and a function from tokens [1, L] to logits [1, L, V]."""
    import torch

    from ..eager_audit import invariant

    compiled = torch.compile(model, backend="bi_ascend", dynamic=True)

    def run(f: Any, ids: torch.Tensor, grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(grad), invariant():
            logits: torch.Tensor = f(input_ids=ids, use_cache=False).logits.float()
            return torch.log_softmax(logits, -1).detach()

    return {
        "compiled": lambda ids: run(compiled, ids, False),
        "eager": lambda ids: run(model, ids, False),
        "eager, with gradients": lambda ids: run(model, ids, True),
    }


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan: keys of `PLAN`, the rest goes to `vllm.LLM`."""
    served = rollout(plan)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=getattr(torch, plan["dtype"])).eval()
    equal: dict[str, int] = {}
    largest = 0.0
    for name, logprobs_of in trainers(model).items():
        equal[name] = 0
        for tokens, logprobs in served:
            ids = torch.tensor([tokens])
            found = logprobs_of(ids[:, :-1])[0].gather(1, ids[0, 1:, None])[:, 0]
            want = torch.tensor(logprobs, dtype=torch.float32)
            equal[name] += int((found == want).sum())
            largest = max(largest, float((found - want).abs().max()))
    return {"logprobs": sum(len(logprobs) for _, logprobs in served), "equal": equal, "largest difference": largest}


if __name__ == "__main__":
    print("RESULT", json.dumps(run(json.loads(sys.argv[1]))), flush=True)
