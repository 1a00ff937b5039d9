"""vLLM on CUDA: attention takes the same tile and one part of the keys for every batch.

How FlashAttention 3 adds up follows the longest query and the longest sequence of the batch, which others may bring
(hopper/heuristics.h, tile_size.h and flash_api.cpp of vllm-project/flash-attention): `num_splits`, in how many parts the keys are
cut; `use_one_mma_wg` and `pagedkv_tma`, and with them how many keys a tile has; whether a window that is longer than every
sequence counts as one. vLLM's Triton attention cuts the keys where no request has more than one query, and newer versions choose
a tile by the same test. So both are told one length for every batch, longer than any, and to cut nothing. Neither kernel computes
anything for queries and keys that are not there: their real lengths are tensors.

What is lost is the split: one request with a long context runs on as many blocks as it has heads for keys. Where there is a window,
FlashAttention 3 begins each tile of queries at the first key that any of them sees, so a row's sum follows its neighbours: there only
the Triton attention is accepted.

Measured on one H100 (vLLM 0.23.0, bfloat16, 18 requests of 1 to 3,000 keys, 60 batches each for 16/8, 32/8, 14/2, 8/8 and 12/4 heads of
64, 96, 128 and 256 and pages of 16 and 128): queries that differ in any bit from the same request alone: 0 with both; with
`num_splits=1` alone up to 12 %, with heads of 64; with a window up to half of them in FlashAttention 3, 0 in Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import HostError
from . import cuda_experts
from .platforms import Platform, attention_layers
from .shared import attribute

LONGEST = 2**20
"""The number of queries and of keys that a request is said to have at most."""
#: module of a backend of vLLM's attention -> what it calls, by keyword
PINNED = {
    "vllm.v1.attention.backends.flash_attn": ("flash_attn_varlen_func", "get_scheduler_metadata"),
    "vllm.v1.attention.backends.triton_attn": ("unified_attention",),
}
_REMEDY = 'write attention_config={"backend": "TRITON_ATTN"}'


def pinned(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` with the same lengths, and one part of the keys, for every batch.

    FlashAttention 3 takes 128 keys at a time in each of its two tiles where heads are of 128 elements of 16 bits and keys lie in
    pages, so there it may choose the lower one for few queries.
    """

    @functools.wraps(plain)
    def call(*args: Any, max_seqlen_q: int, max_seqlen_k: int, **kwargs: Any) -> Any:
        if max_seqlen_q > LONGEST or max_seqlen_k > LONGEST:
            raise HostError(
                f"attention over {max_seqlen_k} keys: bi_compile keeps the order of its sums up to {LONGEST}, set max_model_len to that or less"
            )
        if "num_splits" in kwargs:
            kwargs["num_splits"] = 1
        queries = max_seqlen_q if _one_width(kwargs) else LONGEST
        return plain(*args, max_seqlen_q=queries, max_seqlen_k=LONGEST, **kwargs)

    return call


def _one_width(call: Mapping[str, Any]) -> bool:
    """Whether a call of FlashAttention 3's functions, by its arguments, has tiles of one number of keys."""
    if "headdim" in call:  # get_scheduler_metadata
        return bool(call["headdim"] == 128 and call["qkv_dtype"].itemsize == 2 and call["page_size"])
    if "fa_version" in call:  # flash_attn_varlen_func
        return bool(call["q"].shape[-1] == 128 and call["k"].element_size() == 2 and call["block_table"] is not None)
    return False


def before_config(vllm_config: Any) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model is not None and not model.disable_cascade_attn:
        raise HostError(
            "disable_cascade_attn=False: cascade attention cuts the keys where the requests of a batch have a prefix in common; remove "
            "that line"
        )
    if parallel.decode_context_parallel_size > 1:
        raise HostError(
            f"decode_context_parallel_size={parallel.decode_context_parallel_size}: nothing is known about attention whose keys lie on "
            "several ranks; remove that line"
        )
    cuda_experts.before_config(vllm_config)


@contextlib.contextmanager
def attention_pinned() -> Iterator[None]:
    """What the backends of `PINNED` call is `pinned`."""
    with contextlib.ExitStack() as stack:
        for module, names in ((importlib.import_module(name), names) for name, names in PINNED.items()):
            for name in names:
                stack.enter_context(attribute(module, name, pinned(getattr(module, name))))
        yield


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
    """Every attention layer's backend is one of `PINNED`, for a decoder; FlashAttention is version 3 and has no window. Experts are checked too."""
    cuda_experts.check_model(vllm_config)
    for layer, impl in attention_layers(vllm_config):
        if type(impl).__module__ not in PINNED:
            raise HostError(
                f"{layer} has {type(impl).__name__} for attention, which vLLM calls between the compiled graphs and about which nothing is "
                f"known: {_REMEDY} if the model has ordinary attention, which alone is covered"
            )
        if impl.attn_type != "decoder":
            raise HostError(f"{layer} is attention of the type {impl.attn_type!r}, which was not tried: serve decoders")
        version = getattr(impl, "vllm_flash_attn_version", None)
        if version not in (None, 3):
            raise HostError(
                f"{layer} uses FlashAttention {version}, whose order of sums is known only for version 3: {_REMEDY}"
            )
        if version == 3 and tuple(impl.sliding_window) != (-1, -1):
            raise HostError(
                f"{layer} has a window of {impl.sliding_window[0] + 1} keys, and FlashAttention 3 starts its sums where the window of a "
                f"neighbour starts: {_REMEDY}"
            )


PLATFORM = Platform(
    device="cuda",
    environment={
        "VLLM_BATCH_INVARIANT": ("0", "vLLM's own mode patches the operators that bi_compile replaces a second time"),
    },
    before_config=before_config,
    switches=(attention_pinned, one_sampler, cuda_experts.experts_pinned),
    check_model=check_model,
    refuses_uncompiled=False,
)
