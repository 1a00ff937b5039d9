"""vLLM on CUDA: attention (`cuda_attention`), experts (`cuda_experts`), one kernel for top-k and top-p, and the short way to `lm_head`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from .. import eager
from . import cuda_attention, cuda_experts
from .platforms import Platform
from .shared import attribute


def before_config(vllm_config: Any) -> None:
    cuda_attention.before_config(vllm_config)
    cuda_experts.before_config(vllm_config)


_MM = torch.ops.aten.mm.default


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


@contextlib.contextmanager
def lm_head_called() -> Iterator[None]:
    """The product of `lm_head`, which is not compiled, by a call of what replaces aten.mm: by way of linear and the dispatcher it takes the
    host three more calls of Python functions at each step."""
    method = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding").UnquantizedEmbeddingMethod

    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        entry = eager.replaced_by(_MM, x.device.type)
        if entry is None or bias is not None or x.dim() != 2 or torch.compiler.is_compiling():
            return plain(self, layer, x, bias)
        return entry.replacement(x, layer.weight.t())

    plain = method.apply
    with attribute(method, "apply", apply):
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
    switches=(cuda_attention.attention_pinned, one_sampler, lm_head_called, cuda_experts.experts_pinned),
    check_model=check_model,
    refuses_uncompiled=False,
)
