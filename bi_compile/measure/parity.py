"""Rollout and trainer: are the logprobs that vLLM served those that transformers' model computes of the same tokens?

    python -m bi_compile.measure.parity '{"model": "DIR", "dtype": "bfloat16"}'

vLLM with the pass answers random prompts, each alone and all together, and gives the logprobs of the prompts' tokens and of its
own. The same weights in transformers then read the sequences as a trainer does: in every layout of `LAYOUTS`, in every way of
`WAYS`, with the attentions that "attention" names. Prints one line `RESULT {json}`: how many logprobs there are, and how many of
them each reading has to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import MeasureError
from .requests import engine, prompts

#: keys of a plan that are not vLLM's
PLAN: dict[str, Any] = {
    "requests": 5,
    "prompt": [5, 300],
    "tokens": 16,
    "seed": 0,
    "attention": ["sdpa", "bi_compile"],
    "layouts": ["alone", "padded right", "padded left", "packed"],
    "ways": ["compiled", "eager", "compiled, with gradients", "eager, with gradients"],
}

Sequence = tuple[list[int], list[float]]


def rollout(plan: dict[str, Any]) -> tuple[list[Sequence], int]:
    """For each request its tokens, and the logprobs of all but the first; and how many of them it has alone."""
    from vllm import SamplingParams

    settings = {k: v for k, v in plan.items() if k not in PLAN}
    # prompts are read in chunks, beside others; few tokens a step, so that vLLM's own warm-up is short
    small = {"max_num_batched_tokens": 128, "max_num_seqs": 16, "kv_cache_memory_bytes": 2**28}
    llm = engine({"compilation_config": {"custom_passes": ["bi_ascend"]}, **small, **settings})
    sampling = SamplingParams(
        temperature=0, max_tokens=plan["tokens"], logprobs=1, prompt_logprobs=1, detokenize=False, ignore_eos=True
    )

    def answers(asked: list[Any]) -> list[Sequence]:
        found = []
        for output in llm.generate(asked, sampling, use_tqdm=False):
            (answer,) = output.outputs
            tokens = [*output.prompt_token_ids, *answer.token_ids]
            steps = [*output.prompt_logprobs[1:], *answer.logprobs]
            found.append((tokens, [step[token].logprob for step, token in zip(steps, tokens[1:], strict=True)]))
        return found

    asked = prompts(plan)
    together = answers(asked)
    alone = [answers([prompt])[0] for prompt in asked]
    pairs = [(a, b) for one, all_ in zip(alone, together, strict=True) for a, b in zip(one[1], all_[1], strict=True)]
    return together, sum(a == b for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a model is given, and for each sequence its row and its first place in it."""

    inputs: dict[str, Tensor]
    places: list[tuple[int, int]]


def _alone(sequences: list[list[int]]) -> list[Batch]:
    return [Batch({"input_ids": torch.tensor([tokens])}, [(0, 0)]) for tokens in sequences]


def _padded(sequences: list[list[int]], left: bool) -> list[Batch]:
    longest = max(map(len, sequences))
    before = [(longest - len(tokens)) * left for tokens in sequences]
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (tokens, start) in enumerate(zip(sequences, before, strict=True)):
        ids[i, start : start + len(tokens)] = torch.tensor(tokens)
        mask[i, start : start + len(tokens)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return [Batch(inputs, list(enumerate(before)))]


def _packed(sequences: list[list[int]]) -> list[Batch]:
    ids = torch.cat([torch.tensor(tokens) for tokens in sequences]).unsqueeze(0)
    positions = torch.cat([torch.arange(len(tokens)) for tokens in sequences]).unsqueeze(0)
    starts = [sum(map(len, sequences[:i])) for i in range(len(sequences))]
    return [Batch({"input_ids": ids, "position_ids": positions}, [(0, start) for start in starts])]


#: how a trainer lays sequences side by side
LAYOUTS: dict[str, Callable[[list[list[int]]], list[Batch]]] = {
    "alone": _alone,
    "padded right": lambda sequences: _padded(sequences, left=False),
    "padded left": lambda sequences: _padded(sequences, left=True),
    "packed": _packed,
}
#: scaled_dot_product_attention counts keys from the start of the row (`bi_compile.transformers`)
OF_ANOTHER_ORDER = {("sdpa", "padded left"), ("sdpa", "packed")}


def logprobs(model: Any, batch: Batch, sequences: list[list[int]]) -> list[Tensor]:
    """For each sequence of the batch the logprobs of all its tokens but the first, float32, as vLLM takes them."""
    logits: Tensor = model(**batch.inputs, use_cache=False).logits
    found = []
    for (row, start), tokens in zip(batch.places, sequences, strict=True):
        rows = torch.log_softmax(logits[row, start : start + len(tokens) - 1].float(), -1)
        found.append(rows.gather(1, torch.tensor(tokens[1:]).unsqueeze(1))[:, 0])
    return found


def readings(plan: dict[str, Any], model: Any, sequences: list[list[int]]) -> dict[str, list[Tensor]]:
    """A name for each attention, layout and way -> for each sequence its logprobs."""
    from .. import transformers
    from ..eager_audit import invariant

    transformers.register()
    found = {}
    for attention in plan["attention"]:
        model.set_attn_implementation(attention)
        compiled = torch.compile(model, backend="bi_ascend", dynamic=True)
        for layout in plan["layouts"]:
            if (attention, layout) in OF_ANOTHER_ORDER:
                continue
            batches = LAYOUTS[layout](sequences)
            for way in plan["ways"]:
                run = compiled if way.startswith("compiled") else model
                of_batch = [sequences] if len(batches) == 1 else [[tokens] for tokens in sequences]
                with torch.set_grad_enabled("gradients" in way), invariant():
                    parts = [logprobs(run, *pair) for pair in zip(batches, of_batch, strict=True)]
                found[f"{attention}, {layout}, {way}"] = [x.detach() for part in parts for x in part]
        torch._dynamo.reset()
    return found


def check(plan: dict[str, Any]) -> None:
    """Raise MeasureError where the two sides would compute different functions."""
    from transformers import AutoConfig

    dtype = getattr(torch, str(plan.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise MeasureError(f"dtype={plan.get('dtype')!r}: both sides need one, so write float32, bfloat16 or float16")
    quantised = [
        f"{name}={plan[name]!r}" for name in ("quantization", "kv_cache_dtype") if plan.get(name, "auto") != "auto"
    ]
    if getattr(AutoConfig.from_pretrained(plan["model"]), "quantization_config", None) is not None:
        quantised.append(f"quantization_config in {plan['model']}/config.json")
    if quantised:
        raise MeasureError(
            f"{', '.join(quantised)}: the rollout is quantised and the trainer is not, so they compute different functions: serve the "
            "weights that are trained"
        )


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan: keys of `PLAN`, the rest goes to `vllm.LLM`.

    Raises:
        MeasureError: see `check`.
    """
    plan = {**PLAN, **plan}
    check(plan)
    served, alone = rollout(plan)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=getattr(torch, plan["dtype"])).eval()
    want = torch.tensor([x for _, of_request in served for x in of_request])
    equal = {"rollout, alone": alone}
    largest = {}
    for name, found in readings(plan, model, [tokens for tokens, _ in served]).items():
        equal[name] = int((torch.cat(found) == want).sum())
        largest[name] = float((torch.cat(found) - want).abs().max())
    return {"logprobs": len(want), "equal": equal, "largest difference": max(largest.values())}


if __name__ == "__main__":
    print("RESULT", json.dumps(run(json.loads(sys.argv[1]))), flush=True)
