"""Models that vLLM computes in operators of its own (`odd_models.py`), and usual ones, each started with the key in turn, in one process.

    python tests/vllm/odd_engines.py ["mamba2 eager" "int8 compiled" …] (all, both ways, without)

Prints a line `RESULT {"mamba2 eager": …}` for each: how many of its requests differ between alone and together, or the error
that refused it, and whether requests had been answered before. A model that is served compiled and refused with enforce_eager, or the
other way round, is an error at the end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import mixtures
from odd_models import NAMES, odd_model

from bi_compile.measure import models, process, requests

MODELS: dict[str, Callable[[str, Path], Path]] = {
    **dict.fromkeys(("qwen3", "qwen3-moe", "gemma2", "opt"), models.make),
    "gpt-oss": mixtures.make,
    **dict.fromkeys(NAMES, odd_model),
}

#: prompts are read in chunks; few tokens a step, so that vLLM's own warm-up is short
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 256,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 2**27,
    "compilation_config": {"custom_passes": ["bi_ascend"]},
}
ASKED = {"requests": 16, "prompt": [5, 60], "seed": 0}
TOKENS = 4


def outcome(model: Path, **settings: Any) -> dict[str, Any]:
    """ "differ": how many requests; or "refused": the error, with "answered": how many requests got an answer before it."""
    answered = 0
    try:
        llm = requests.engine({"model": str(model), **SETTINGS, **settings})
        prompts, sampling = requests.prompts(ASKED), requests.greedy(TOKENS)
        alone = []
        for prompt in prompts:
            alone.append(requests.bits(llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0]))
            answered += 1
        together = [requests.bits(o.outputs[0]) for o in llm.generate(prompts, sampling, use_tqdm=False)]
        return {"differ": sum(a != b for a, b in zip(alone, together, strict=True))}
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        return {"refused": f"{type(error).__name__}: {error}", "answered": answered}


def main(cases: list[str]) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    served: dict[str, set[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases or [f"{name} {way}" for name in MODELS for way in ("eager", "compiled")]:
            name, way = case.split()
            model = Path(folder) / name
            if not model.exists():
                MODELS[name](name, model)
            found = outcome(model, enforce_eager=way == "eager")
            cleanup_dist_env_and_memory()  # a model with experts needs groups of its own
            print("RESULT", json.dumps({case: found}), flush=True)
            served.setdefault(name, set()).add("differ" in found)
    uneven = [name for name, outcomes in served.items() if len(outcomes) > 1]
    if uneven:
        sys.exit(f"served one way and refused the other: {', '.join(uneven)}")


if __name__ == "__main__":
    os.environ.update({name: value for name, value in process.ENVIRONMENT.items() if name not in os.environ})
    main(sys.argv[1:])
