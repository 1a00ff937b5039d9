"""Rollout and trainer (`bi_compile.measure.parity`) for five kinds of models in two dtypes: are all logprobs equal?

    python tests/vllm/sweep_parity.py                        # all, a minute or two each
    python tests/vllm/sweep_parity.py gemma2 "qwen2, bfloat16" '{"ways": ["eager"], "enforce_eager": true}'

Models are random and two layers deep, but for smollm2, SmolLM2-135M-Instruct. Prints a line `RESULT {"llama, float32": …}` for
each: how many logprobs there are, and how many of them each reading of the trainer has to the bit.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from bi_compile.measure import parity, process
from bi_compile.measure.models import make, smollm2

#: name -> what differs from the model of that family
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 64},  # shorter than the prompts
    "qwen3-moe": {},
    "smollm2": {},
}
#: scaled_dot_product_attention knows no soft-cap
ATTENTION = {"gemma2": ["bi_compile"]}


def main(asked: list[str]) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    changes = {k: v for text in asked if text.startswith("{") for k, v in json.loads(text).items()}
    names = [text for text in asked if not text.startswith("{")]
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in ((name, dtype) for name in MODELS for dtype in ("float32", "bfloat16")):
            case = f"{name}, {dtype}"
            if names and name not in names and case not in names:
                continue
            where = Path(folder) / name
            path = smollm2(where) if name == "smollm2" else make(name, where, num_hidden_layers=2, **MODELS[name])
            plan = {"model": str(path), "dtype": dtype, **changes}
            plan |= {"attention": ATTENTION[name]} if name in ATTENTION else {}
            try:
                found = parity.run(plan)
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                found = {"failed": f"{type(error).__name__}: {error}"}
            cleanup_dist_env_and_memory()  # a model with experts needs groups of its own
            print("RESULT", json.dumps({case: found}), flush=True)


if __name__ == "__main__":
    os.environ.update({name: value for name, value in process.ENVIRONMENT.items() if name not in os.environ})
    main(sys.argv[1:])
