"""Requests alone and together on one vLLM engine: how many get different bits?

    python -m bi_compile.measure.requests '{"model": "DIR", "dtype": "bfloat16", "compilation_config": {"custom_passes": ["bi_ascend"]}}'

Prints one line `RESULT {json}`: for each batch size, of how many requests the logprobs and the tokens differ from those
that the request got alone, and the tokens per second (the median of "rounds"); with "bits" a digest of what the requests
got alone; with "turns" each round waits for its turn (see `process.take_turns`). With "questions" each request is one of
them, in the model's chat template, "texts" holds the answers: those alone, then those of the last batch size, and
"equal_tokens" and "equal_logprobs" how many tokens of each answer came before the first that was another one, or that had
another logprob (None: there was none). Prefix
caching is off unless asked for: with it on, the second run would read the first one's keys and values.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from .process import wait_for_turn

#: keys of a plan that are not vLLM's
PLAN: dict[str, Any] = {
    "questions": [],
    "requests": 16,
    "batches": [16],
    "prompt": [5, 60],
    "tokens": 16,
    "seed": 0,
    "bits": False,
    "rounds": 1,
    "turns": False,
}


def settled(plan: dict[str, Any], known: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a plan that are ours, with `known` as their defaults, and those that are vLLM's."""
    return {**known, **{k: v for k, v in plan.items() if k in known}}, {k: v for k, v in plan.items() if k not in known}


def engine(settings: dict[str, Any]) -> Any:
    """A `vllm.LLM` for comparisons; `settings` are its arguments, and come before the ones that stand here."""
    from vllm import LLM

    usual = {
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "seed": 0,
        "enable_prefix_caching": False,
    }
    return LLM(**{**usual, **settings})


def prompts(own: dict[str, Any]) -> list[Any]:
    """Random prompts: `requests` of them, of `prompt` tokens, from `seed`."""
    rng = random.Random(own["seed"])
    return [
        {"prompt_token_ids": [rng.randrange(10, 4000) for _ in range(rng.randint(*own["prompt"]))]}
        for _ in range(own["requests"])
    ]


def greedy(tokens: int, text: bool = False) -> Any:
    """Sampling parameters: `tokens` tokens, the likeliest each time, with the logprobs of five.

    text: an answer has a text, and may end before.
    """
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, detokenize=text, ignore_eos=not text)


def bits(output: Any) -> list[list[tuple[int, float]]]:
    """For each token the logprobs of the likeliest."""
    return [[(token, p.logprob) for token, p in step.items()] for step in output.logprobs]


def equal_before(alone: Sequence[Any], together: Sequence[Any]) -> int | None:
    """How many steps are equal before the first that is not, the end being a step too; None: all are."""
    pairs = enumerate(itertools.zip_longest(alone, together))
    return next((i for i, (a, b) in pairs if a != b), None)


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan: keys of `PLAN`, the rest goes to `vllm.LLM`."""
    own, settings = settled(plan, PLAN)
    chat = bool(own["questions"])
    llm = engine({"skip_tokenizer_init": False, **settings} if chat else settings)
    sampling = greedy(own["tokens"], text=chat)
    asked = [[{"role": "user", "content": q}] for q in own["questions"]] or prompts(own)
    answer = llm.chat if chat else llm.generate
    alone = [answer([p], sampling, use_tqdm=False)[0].outputs[0] for p in asked]
    result: dict[str, Any] = {"requests": len(asked), "batches": {}}
    if own["bits"]:
        result["bits"] = hashlib.sha256(repr([bits(a) for a in alone]).encode()).hexdigest()
    for size in own["batches"]:
        seconds = []
        for _ in range(own["rounds"]):
            if own["turns"]:
                wait_for_turn()
            start = time.perf_counter()
            batches = [answer(asked[i : i + size], sampling, use_tqdm=False) for i in range(0, len(asked), size)]
            seconds.append(time.perf_counter() - start)
        together = [output.outputs[0] for batch in batches for output in batch]
        result["batches"][size] = {
            "logprobs": sum(bits(a) != bits(b) for a, b in zip(alone, together, strict=True)),
            "tokens": sum(list(a.token_ids) != list(b.token_ids) for a, b in zip(alone, together, strict=True)),
            "tokens_per_second": sum(len(b.token_ids) for b in together) / statistics.median(seconds),
        }
    if chat:
        result["texts"] = [[a.text for a in alone], [b.text for b in together]]
        pairs = list(zip(alone, together, strict=True))
        result["equal_tokens"] = [equal_before(a.token_ids, b.token_ids) for a, b in pairs]
        result["equal_logprobs"] = [equal_before(bits(a), bits(b)) for a, b in pairs]
    return result


if __name__ == "__main__":
    print("RESULT", json.dumps(run(json.loads(sys.argv[1]))), flush=True)
