"""vLLM's attention on CUDA, which it calls between its graphs: bi_compile's kernel, or vLLM's own told one length for every batch.

bi_compile's kernel (`ours`) stands in vLLM's Triton backend, TRITON_ATTN: keys in segments of fixed positions, which one program takes or
several, so one request with a long context is divided and its bits stay (`ops.paged_attention`). An engine gets it where it generates faster
than FlashAttention 3 in one part, or where that would be refused (`_ours_is_better`), unless the user names a backend in attention_config.
What that kernel has not (a soft-cap, sinks, ALiBi, quantised keys) goes to vLLM's own Triton kernel, `pinned`; which of the two a layer gets
follows the layer, never the batch. Otherwise vLLM's choice stands, FlashAttention 3, `pinned`.

How vLLM's kernels add up follows the longest query and the longest sequence of the batch, which others may bring. FlashAttention 3
(hopper/heuristics.h, tile_size.h and flash_api.cpp of vllm-project/flash-attention): `num_splits`, in how many parts the keys are
cut; `use_one_mma_wg` and `pagedkv_tma`, and with them how many keys a tile has; whether a window that is longer than every
sequence counts as one. vLLM's Triton attention cuts the keys where no request has more than one query, and newer versions choose
a tile by the same test. So both are told one length for every batch, longer than any, and to cut nothing. Neither kernel computes
anything for queries and keys that are not there: their real lengths are tensors.

What is lost there is the split: one request with a long context runs on as many blocks as it has heads for keys. Where there is a window,
FlashAttention 3 begins each tile of queries at the first key that any of them sees, so a row's sum follows its neighbours: it is refused.

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

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform

from ..errors import HostError
from ..kernels import cuda
from .platforms import attention_layers
from .shared import attribute

LONGEST = 2**20
"""The number of queries and of keys that a request is said to have at most."""
PAGE = 64
"""Keys in a page, vLLM's block_size, for `ours` unless the user says another number."""
LARGEST_HEAD = 128
"""Elements of a head up to which `ours` was measured beside FlashAttention 3."""
TRITON = "vllm.v1.attention.backends.triton_attn"
#: module of a backend of vLLM's attention -> what it calls, by keyword
PINNED = {
    "vllm.v1.attention.backends.flash_attn": ("flash_attn_varlen_func", "get_scheduler_metadata"),
    TRITON: ("unified_attention",),
}
#: what `ours` takes of vLLM's unified_attention; of the rest, what does not follow the layer alone
TAKEN = frozenset(
    "q k v out cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale causal window_size block_table k_descale v_descale "
    "seq_threshold_3D num_par_softmax_segments softmax_segm_output softmax_segm_max softmax_segm_expsum use_td".split()
)
OF_THE_BATCH = ("mm_prefix_range", "rswa_prefix_lens")
_one_graph_for_all = False
"""Whether an engine of this process has cudagraph_mode FULL: vLLM captures a batch of one token each, and replays it for prompts."""
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


def ours(plain: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's unified_attention by `ops.paged_attention`'s kernel; `plain` for layers with something that it has not."""

    @functools.wraps(plain)
    def unified_attention(**call: Any) -> None:
        for name in OF_THE_BATCH:
            if call.get(name) is not None:
                raise HostError(
                    f"{TRITON}: unified_attention({name}=…) follows the batch and was not tried: serve another model"
                )
        if not is_ours(call):
            plain(**call)
            return
        out = call["out"]
        if not out.is_contiguous():
            raise HostError(
                f"{TRITON}: unified_attention gives its output {tuple(out.stride())} as strides, and bi_compile's kernel has no gaps"
            )
        left, right = call["window_size"]
        cuda.fill_paged()(
            out, call["q"], call["k"], call["v"], call["cu_seqlens_q"][1:], call["seqused_k"], call["block_table"],
            call["softmax_scale"], left, max(right, 0), 0 if _one_graph_for_all else call["max_seqlen_q"], call["max_seqlen_k"],
        )  # fmt: skip

    return unified_attention


def is_ours(call: Mapping[str, Any]) -> bool:
    """Whether `ours` has all that a layer asks of vLLM's unified_attention.

    Nothing is asked by None, False, a soft-cap of 0, KVQuantMode.NONE, a chunk_lookback of -1.
    """
    for name, x in call.items():
        if x is None or x is False or name in TAKEN:
            continue
        if isinstance(x, torch.Tensor) or x not in (0, -1):
            return False
    return bool(call["causal"]) and call["q"].dtype == call["k"].dtype


def _copied(plain: Callable[..., None]) -> Callable[..., None]:
    """vLLM's C++ operator in place of its Triton kernel where keys are written as they are: the same bits, less of the host's time."""
    from vllm import _custom_ops

    @functools.wraps(plain)
    def reshape_and_cache_flash(key: Any, value: Any, key_cache: Any, *rest: Any) -> None:
        function = _custom_ops.reshape_and_cache_flash if key.dtype == key_cache.dtype else plain
        function(key, value, key_cache, *rest)

    return reshape_and_cache_flash


@contextlib.contextmanager
def attention_pinned() -> Iterator[None]:
    """What the backends of `PINNED` call is `pinned`, and `ours` stands before it in the Triton backend."""
    with contextlib.ExitStack() as stack:
        for module, names in ((importlib.import_module(name), names) for name, names in PINNED.items()):
            for name in names:
                told = pinned(getattr(module, name))
                stack.enter_context(attribute(module, name, ours(told) if module.__name__ == TRITON else told))
        triton = importlib.import_module(TRITON)
        stack.enter_context(
            attribute(triton, "triton_reshape_and_cache_flash", _copied(triton.triton_reshape_and_cache_flash))
        )
        yield


def before_config(vllm_config: Any) -> None:
    """Settings that cut the keys are refused; the Triton backend where its kernel is the better one, unless the user names a backend."""
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
    if model is None or model.use_mla:
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention, triton, cache = vllm_config.attention_config, AttentionBackendEnum.TRITON_ATTN, vllm_config.cache_config
    if attention.backend is None and _ours_is_better(model, cache):
        attention.backend = triton
    if attention.backend is triton and not cache.user_specified_block_size and not model.is_hybrid:
        # pages that hold the keys of a tile: half the time of pages of 16
        cache.block_size, cache.user_specified_block_size = PAGE, True


def _ours_is_better(model: Any, cache: Any) -> bool:
    """Whether FlashAttention 3 would be refused (a window, another device than Hopper), or the model is one that `ours` serves and generates
    faster with it: 16 bits, heads of up to 128 elements, no soft-cap, keys kept as they are. vLLM's Triton backend has heads from 32 on."""
    device, size = current_platform.get_device_capability(), model.get_head_size()
    refused = model.get_sliding_window() is not None or (device is not None and device.major != 9)
    served = (
        size <= LARGEST_HEAD
        and model.dtype in (torch.bfloat16, torch.float16)
        and cache.cache_dtype in ("auto", "bfloat16", "float16")
        and not getattr(model.hf_text_config, "attn_logit_softcapping", None)
    )
    return size >= 32 and (refused or served)


def check_model(vllm_config: Any) -> None:
    """Every attention layer's backend is one of `PINNED`, for a decoder; FlashAttention is version 3 and has no window."""
    global _one_graph_for_all
    mode = vllm_config.compilation_config.cudagraph_mode
    _one_graph_for_all |= mode is not None and mode.mixed_mode() is CUDAGraphMode.FULL
    if getattr(vllm_config.model_config, "is_mm_prefix_lm", False):
        raise HostError(
            f"{vllm_config.model_config.model} attends to images in both directions (is_mm_prefix_lm), which was not tried: serve another "
            "model"
        )
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
