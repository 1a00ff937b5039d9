"""Reinforcement learning on a CPU: vLLM answers, a torch trainer learns from the answers, vLLM gets the new weights. Twice.

    python examples/rl_on_cpu.py            # 30 steps without the pass, then 30 with it
    python examples/rl_on_cpu.py --layers 2 # quicker: the model's first two layers of 30, whose answers are no language

GRPO on SmolLM2-135M-Instruct, bfloat16. The reward is the share of the letter e among an answer's letters. Each token of an
answer is weighted by the ratio of the trainer's probability to the rollout's. Both have the same weights at that moment, so the
ratio should be 1 and the KL divergence between them 0. Prints both at every step, side by side, and writes them to --csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bi_compile
import bi_compile.transformers
from bi_compile.measure.models import smollm2

QUESTIONS = ("Why is the sky blue?", "Tell me about bees.")
ANSWERS, TOKENS = 4, 16  # to each question, and in each
COLUMNS = ("step", "reward", "ratio", "kl")


def reward(text: str) -> float:
    letters = [c for c in text.lower() if c.isalpha()]
    return letters.count("e") / max(len(letters), 1)


def train(model_dir: str, steps: int, with_pass: bool) -> Iterator[dict[str, float]]:
    """One step after another: the mean reward, the largest |ratio - 1|, and the KL divergence of the trainer from the rollout."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    # ---- the only differences: the key, the attention, and the with-block around the trainer's forward pass
    key: Any = {"custom_passes": ["bi_ascend"]} if with_pass else {}
    bi_compile.transformers.register()
    attention, same_bits = ("bi_compile", bi_compile.invariant) if with_pass else ("sdpa", contextlib.nullcontext)

    # not compiled, and small steps: it starts sooner, and has the same bits
    llm = LLM(
        model_dir, dtype="bfloat16", max_model_len=128, max_num_batched_tokens=256, max_num_seqs=8, kv_cache_memory_bytes=2**27,
        enable_prefix_caching=False, enforce_eager=True, seed=0, compilation_config=key,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation=attention).eval()
    weights = [p.detach().float() for p in model.parameters()]  # a step is smaller than bfloat16 can show
    optimizer = torch.optim.AdamW(weights, lr=2e-5, weight_decay=0)

    for step in range(steps):
        # ---- rollout
        how = SamplingParams(n=ANSWERS, temperature=1, max_tokens=TOKENS, logprobs=0)
        asked = llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], how, use_tqdm=False)
        rewards = torch.tensor([[reward(a.text) for a in request.outputs] for request in asked])
        better = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        pairs = [(list(request.prompt_token_ids), a) for request in asked for a in request.outputs]
        sequences = [prompt + list(a.token_ids) for prompt, a in pairs]
        rollout = torch.tensor([p[t].logprob for _, a in pairs for t, p in zip(a.token_ids, a.logprobs, strict=True)])

        # ---- trainer: all sequences packed into one row
        ids = torch.tensor([[token for s in sequences for token in s]])
        positions = torch.cat([torch.arange(len(s)) for s in sequences]).unsqueeze(0)
        ends = torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()
        at = torch.cat(
            [torch.arange(end - len(a.token_ids), end) for end, (_, a) in zip(ends, pairs, strict=True)]
        )  # the answers' tokens
        with same_bits():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, at - 1]
            logprobs = torch.log_softmax(logits.float(), -1).gather(1, ids[0, at].unsqueeze(1))[:, 0]

        # ---- GRPO
        ratio = torch.exp(logprobs - rollout)
        weight = torch.cat([b.expand(len(a.token_ids)) for b, (_, a) in zip(better.flatten(), pairs, strict=True)])
        loss = -torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for w, p in zip(weights, model.parameters(), strict=True):
            w.grad, p.grad = None if p.grad is None else p.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for w, p in zip(weights, model.parameters(), strict=True):
                p.copy_(w)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(model.state_dict().items())})

        away = (logprobs - rollout).detach()
        yield {
            "step": step,
            "reward": float(rewards.mean()),
            "ratio": float((away.exp() - 1).abs().max()),
            "kl": float((away.exp() - 1 - away).mean()),
        }


def keep_layers(model_dir: str, layers: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, num_hidden_layers=layers)
    model.save_pretrained(model_dir)


def measure(model_dir: str, steps: int, with_pass: bool) -> list[dict[str, float]]:
    """`train` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--steps",
        str(steps),
        "--model",
        model_dir,
        "--one",
        "with" if with_pass else "without",
    ]
    found = []
    # the engine in the trainer's process: new weights are handed over, not sent
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("STEP "):
                found.append(json.loads(line.removeprefix("STEP ")))
                print(
                    f"{'with' if with_pass else 'without'} the pass, step {found[-1]['step'] + 1} of {steps}",
                    file=sys.stderr,
                )
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, help="how many of SmolLM2's 30 layers are kept (default: all)")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--csv", help="write what was printed there")
    parser.add_argument("--one", choices=["with", "without"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        for found in train(given.model, given.steps, given.one == "with"):
            print("STEP", json.dumps(found), flush=True)
        return
    model_dir = given.model or tempfile.mkdtemp()
    smollm2(Path(model_dir))
    if given.layers:
        keep_layers(model_dir, given.layers)
    sides = {name: measure(model_dir, given.steps, name == "with") for name in ("without", "with")}
    print(f"{'':6}{'without the pass':>32}{'with it':>32}")
    print("  step" + "   reward  max|ratio-1|        KL" * 2)
    for rows in zip(*sides.values(), strict=True):
        print(
            f"{rows[0]['step']:6.0f}" + "".join(f"{r['reward']:9.3f}  {r['ratio']:12.3g}{r['kl']:10.3g}" for r in rows)
        )
    if given.csv:
        with open(given.csv, "w", newline="") as file:
            layers = f"the first {given.layers} of 30 layers of " if given.layers else ""
            print(
                f"# GRPO on {layers}SmolLM2-135M-Instruct, bfloat16, vLLM and torch on a CPU: examples/rl_on_cpu.py",
                file=file,
            )
            writer = csv.DictWriter(file, ["mode", *COLUMNS])
            writer.writeheader()
            writer.writerows({"mode": name, **row} for name, rows in sides.items() for row in rows)


if __name__ == "__main__":
    main()
