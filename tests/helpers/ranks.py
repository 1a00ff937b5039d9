"""The same requests on 1, 2 and 4 tensor-parallel ranks of vLLM's CPU engine, with `tp_invariant` and without.

    python tests/helpers/ranks.py                             # all: 13 models, two dtypes, compiled and eager
    python tests/helpers/ranks.py qwen3 "mixtral, bfloat16, eager"

Prints a line for each case: whether the logprobs of all requests are the same bits on 1, 2 and 4 ranks, and of how many requests they
differ alone and together. "plain" cases have the pass without the option. The models are random and two layers deep, but their zeros are
negative, and their biases are not zero.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mixtures
import torch
from engines import cold_caches

from bi_compile.measure import models, process

MOST = 4
HOW = ("compiled", "eager", "plain")
#: dense models beside those of `mixtures`: name -> (family, what differs)
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {}),
    "opt": ("opt", {}),  # biases behind the products that are divided
    "two kv heads": ("qwen3", {"num_key_value_heads": 2}),  # fewer than ranks
    "odd vocabulary": ("llama", {"vocab_size": 4099, "tie_word_embeddings": True}),
}
MODELS = [*(name for name in mixtures.MODELS if not name.startswith("deepseek")), *DENSE]


def make(name: str, folder: Path) -> Path:
    """The model of that name, made once."""
    if (folder / "config.json").exists():
        return folder
    if name in mixtures.MODELS:
        return mixtures.make(name, folder)
    family, differs = DENSE[name]
    return models.make(family, folder, num_hidden_layers=2, **differs)


def negative_zeros(folder: Path) -> None:
    """A tenth of the embeddings become -0.0."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for name, x in weights.items():
        if "embed_tokens" in name:
            x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = -0.0
    save_file(weights, file, {"format": "pt"})


def run(name: str, dtype: str, how: str, ranks: int, root: Path, **more: Any) -> tuple[dict[str, Any], str]:
    """`bi_compile.measure.requests` on so many ranks. Raises ProcessFailed: the engine did not start."""
    folder = root / name
    if not (folder / "config.json").exists():
        negative_zeros(make(name, folder))
    cores = sorted(os.sched_getaffinity(0))
    plan = {
        "model": str(folder), "dtype": dtype, "requests": 8, "batches": [8], "prompt": [5, 100], "tokens": 8, "bits": True,
        "enforce_eager": how == "eager", "tensor_parallel_size": ranks, "kv_cache_memory_bytes": 2**27,
        "compilation_config": {"custom_passes": ["bi_ascend"]},
        "additional_config": {"bi_compile": {} if how == "plain" else {"tp_invariant": MOST}},
    } | more  # fmt: skip
    bind = (
        {} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[r % len(cores)]) for r in range(ranks))}
    )
    environment = {"VLLM_LOGGING_LEVEL": "INFO", **bind, **cold_caches(root)}
    return process.run_module("bi_compile.measure.requests", plan, 540, **environment)


def _cases(chosen: list[str]) -> Iterator[tuple[str, str, str]]:
    for name in MODELS:
        for dtype in ("bfloat16", "float32"):
            for how in HOW:
                if not chosen or name in chosen or f"{name}, {dtype}, {how}" in chosen:
                    yield name, dtype, how


def main(chosen: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, how in _cases(chosen):
            bits, differ = {}, {}
            for ranks in (1, 2, MOST):
                try:
                    result, _ = run(name, dtype, how, ranks, Path(folder))
                    bits[ranks], differ[ranks] = result["bits"][:8], mixtures.differing(result)["8"]
                except process.ProcessFailed as error:
                    why = [line for line in str(error).splitlines() if "Error" in line]
                    bits[ranks] = f"did not start: {(why or [str(error)])[0][-300:]}"
            verdict = "the same bits" if len(set(bits.values())) == 1 and differ else "OTHER BITS"
            print(f"{name}, {dtype}, {how}: {verdict} {bits}; differ in a batch {differ}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
