"""vLLM on CUDA: attention (`cuda_attention`), experts (`cuda_experts`), and one kernel for top-k and top-p."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from . import cuda_attention, cuda_experts
from .platforms import Platform
from .shared import attribute


def before_config(vllm_config: Any) -> None:
    cuda_attention.before_config(vllm_config)
    cuda_experts.before_config(vllm_config)


@contextlib.contextmanager
def one_sampler() -> Iterator[None]:
    """top-k and top-p by vLLM's Triton kernel for every batch; up to 0.23 or so vLLM sorts where fewer than 8 rows ask."""
    sampler = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")

    def for_every_batch(logits: Any, k: Any, p: Any, allow_cpu_sync: bool = False) -> Any:
        if logits.device.type != "cuda":
            return plain(logits, k, p, allow_cpu_sync)
        return sampler.apply_top_k_top_p_triton(logits, k, p) if logits.shape[0] else logits

    plain = sampler.apply_top_k_top_p_pytorch
    with attribute(sampler, "apply_top_k_top_p_pytorch", for_every_batch):
        yield


def check_model(vllm_config: Any) -> None:
    cuda_experts.check_model(vllm_config)
    cuda_attention.check_model(vllm_config)


PLATFORM = Platform(
    device="cuda",
    environment={
        "VLLM_BATCH_INVARIANT": ("0", "vLLM's own mode patches the operators that bi_compile replaces a second time"),
    },
    before_config=before_config,
    switches=(cuda_attention.attention_pinned, one_sampler, cuda_experts.experts_pinned),
    check_model=check_model,
    refuses_uncompiled=False,
)
