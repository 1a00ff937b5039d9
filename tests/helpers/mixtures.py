"""Mixtures of experts and tensor parallelism in vLLM's CPU engine: requests alone and together, for many models and ways to run.

    python tests/helpers/mixtures.py                        # all, 80 engines, a minute each
    python tests/helpers/mixtures.py gpt-oss "glm4-moe, float32, eager"

Prints a line for each engine: of 48 requests those that differ in any logprob, by the size of the batch. Cases are named
`model, dtype, how`, how being "compiled", "eager", "two ranks" (compiled), "two ranks, eager" or, without the pass, "plain". Models are
random and two layers deep. DeepSeek's own are refused by name for their latent attention.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engines import cold_caches

from bi_compile.measure import process
from bi_compile.measure.models import write

SIZES: dict[str, Any] = dict(
    hidden_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=4096, max_position_embeddings=2048,
    initializer_range=0.05, tie_word_embeddings=False,
)  # fmt: skip
#: sigmoid scores, groups, a bias that corrects the choice, a shared expert, renormalised weights that are scaled, a first layer without experts
DEEPSEEK: dict[str, Any] = dict(
    intermediate_size=512, moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, n_group=4,
    topk_group=2, first_k_dense_replace=1,
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
)
#: name -> (configuration class of transformers, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(
            intermediate_size=512, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, head_dim=64
        ),
    ),
    # a shared expert with a gate, weights that are not renormalised
    "qwen2-moe": (
        "Qwen2MoeConfig",
        dict(
            intermediate_size=512, moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts=8, num_experts_per_tok=2
        ),
    ),
    "mixtral": ("MixtralConfig", dict(intermediate_size=512, num_local_experts=8, num_experts_per_tok=2, head_dim=64)),
    # biases, clamped swiglu, sinks, a window
    "gpt-oss": (
        "GptOssConfig",
        dict(
            intermediate_size=256, num_local_experts=8, num_experts_per_tok=4, sliding_window=128, head_dim=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    # DeepSeek-V3's mixture with ordinary attention
    "glm4-moe": ("Glm4MoeConfig", dict(DEEPSEEK, head_dim=64, routed_scaling_factor=1.5)),
    # DeepSeek-V2's and V3's own have latent attention, which is refused
    "deepseek-v2": ("DeepseekV2Config", dict(DEEPSEEK, **LATENT, topk_method="group_limited_greedy")),
    "deepseek-v3": ("DeepseekV3Config", dict(DEEPSEEK, **LATENT)),
    "qwen3": ("Qwen3Config", dict(intermediate_size=1536, head_dim=64)),
}  # fmt: skip
HOW = ("compiled", "eager", "two ranks", "two ranks, eager", "plain")
DTYPES = ("bfloat16", "float32")
REQUESTS = {"requests": 48, "batches": [3, 16, 48], "prompt": [5, 100], "tokens": 8, "kv_cache_memory_bytes": 2**28}


def make(name: str, folder: Path) -> Path:
    """Write the model into `folder`, unless it is there: weights and biases normal, float32."""
    kind, differs = MODELS[name]
    return write(kind, {**SIZES, **differs}, folder, draw=_biases)


def _biases(model: torch.nn.Module) -> None:
    for where, x in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in where:
            x.normal_(0, SIZES["initializer_range"])


def plan(how: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments of the engine, and its environment."""
    settings: dict[str, Any] = {"enforce_eager": "eager" in how}
    if how != "plain":
        settings["compilation_config"] = {"custom_passes": ["bi_ascend"]}
    if "two ranks" not in how:
        return settings, {}
    # on a machine with one NUMA node vLLM must be told which ranks have which cores
    first, *_, last = sorted(os.sched_getaffinity(0)) * 2
    return settings | {"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{last}"}


def run(name: str, dtype: str, how: str, root: Path, **more: Any) -> tuple[dict[str, Any], str]:
    """`bi_compile.measure.requests` of one engine: its result, and all that it printed. Raises ProcessFailed: it did not start."""
    settings, environment = plan(how)
    asked = {"model": str(make(name, root / name)), "dtype": dtype, **REQUESTS, **settings, **more}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO", **cold_caches(root)}
    return process.run_module("bi_compile.measure.requests", asked, 540, **environment)


def differing(result: dict[str, Any]) -> dict[str, int]:
    return {size: max(b["logprobs"], b["tokens"]) for size, b in result["batches"].items()}


def _cases(chosen: list[str]) -> Iterator[tuple[str, str, str]]:
    for name in MODELS:
        for dtype in DTYPES:
            for how in HOW:
                case = f"{name}, {dtype}, {how}"
                if not chosen or name in chosen or case in chosen:
                    yield name, dtype, how


def main(chosen: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, how in _cases(chosen):
            try:
                result, said = run(name, dtype, how, Path(folder))
                line = next((text for text in said.splitlines() if " bi_compile: " in text), "")
                print(
                    f"{name}, {dtype}, {how}: differ {differing(result)}{line and '; ' + line.partition(' bi_compile: ')[2]}"
                )
            except process.ProcessFailed as error:
                why = [text for text in str(error).splitlines() if "unproven" in text or "Error" in text]
                print(f"{name}, {dtype}, {how}: did not start: {(why or [str(error)])[0][-400:]}")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
