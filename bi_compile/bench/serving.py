"""On CUDA: vLLM as it comes, vLLM's batch-invariant mode, and vLLM with the pass, engines of the same GPUs that take turns."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from .measured import Measured, geometric_mean, ratio_of_medians

#: what is compared -> what its engine is told
ENGINES: dict[str, dict[str, Any]] = {
    "vLLM": {},
    # vLLM wants a backend to be named in this mode
    "VLLM_BATCH_INVARIANT=1": {
        "environment": {"VLLM_BATCH_INVARIANT": "1"},
        "attention_config": {"backend": "FLASH_ATTN"},
    },
    "with the pass": {"compilation_config": {"custom_passes": ["bi_ascend"]}},
}
#: Qwen3-0.6B's shape
MODEL: dict[str, Any] = dict(
    hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True,
)  # fmt: skip
#: room for 256 requests of 384 tokens, and three engines on one GPU of 80 GB
ROOM = {"kv_cache_memory_bytes": 14 * 2**30, "gpu_memory_utilization": 0.25}


def engine(ranks: int = 1) -> Measured:
    """Random weights in bfloat16, default compilation and CUDA graphs; the engines start with cold caches, vLLM's two
    together, ours alone, since it times kernels then; they take turns at each case of each round. ranks: tensor_parallel_size."""
    from ..measure.models import make
    from ..measure.process import take_turns

    with tempfile.TemporaryDirectory() as folder:
        model = str(make("qwen3", Path(folder) / "model", **MODEL))
        plan = {"model": model, "dtype": "bfloat16", "tensor_parallel_size": ranks, **ROOM}
        plans = [
            {
                **plan,
                **told,
                "environment": {**told.get("environment", {}), "VLLM_CACHE_ROOT": str(Path(folder) / name)},
            }
            for name, told in ENGINES.items()
        ]
        found = take_turns("bi_compile.measure.serving", plans, at_once=2)
    return table(dict(zip(ENGINES, found, strict=True)), ranks)


def two_ranks() -> Measured:
    """The same on two GPUs."""
    return engine(2)


def table(found: dict[str, dict[str, Any]], ranks: int = 1) -> Measured:
    """Of what `measure.serving` found of each of ENGINES: medians, and what the pass has of the others' speed, with the 95 % interval of the
    ratio to vLLM and the ratio of the fastest rounds, which the host held up least."""
    from ..measure.serving import CASES

    theirs, mode, ours = (one["seconds"] for one in found.values())
    rounds = len(next(iter(ours.values())))
    measured = Measured(
        f"vLLM end to end, Qwen3-0.6B's shape, {ranks} GPU{'s' * (ranks > 1)}, medians of {rounds} rounds",
        ("case", "unit", *found, "pass / vLLM", "95 %", "fastest rounds", "pass / mode"),
    )
    served, known = [], 0
    for case in ours:
        requests, _, tokens = CASES[case]
        times = [statistics.median(one[case]) for one in (theirs, mode, ours)]
        ratio, low, high = ratio_of_medians(theirs[case], ours[case])
        known += high - low <= 2 * 0.03 * ratio
        if tokens > 1:
            served.append(ratio)
        measured.add_row(
            case, "tok/s" if tokens > 1 else "ms", *(f"{requests * tokens / t if tokens > 1 else t * 1e3:.1f}" for t in times),
            f"{ratio:.3f}", f"{low:.2f} to {high:.2f}", f"{min(theirs[case]) / min(ours[case]):.2f}", f"{times[1] / times[2]:.2f}",
        )  # fmt: skip
    costs = (
        f"{name} {one['differ']}, {one['start']:.0f}, " + (f"{one['peak']:.1f}" if one["peak"] else "-")
        for name, one in found.items()
    )
    measured.line = (
        f"by the number of requests geometric mean {geometric_mean(served):.3f}, least {min(served):.2f}; {known} of {len(ours)} ratios are "
        f"known to 3 %; of 16 requests differ among 112, start s, GiB at most: {'; '.join(costs)}"
    )
    return measured
