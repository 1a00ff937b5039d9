"""vllm-ascend's attention between the compiled graphs: latent attention in one form, and captured graphs.

Latent attention (MLA) has two forms in vllm-ascend: decode multiplies queries into the latent space (absorbed), prefill
multiplies keys and values out of it, and joins its parts at places that follow how many requests there are. Their bits
differ, and which form a token takes follows the chunk that it is in, so the batch: the last token of a prompt alone in a chunk, or
behind a prefix that was cached, is decoded. Here all tokens take the absorbed form, in one call of the attention operator over the
latent keys in their pages.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import HostError
from ..kernels.ascend import ascendc
from ..targets import acl_graph
from .platforms import attention_layers
from .shared import attribute


@contextlib.contextmanager
def one_latent_form() -> Iterator[None]:
    """All tokens of `AscendMLAImpl` are decoded: in the absorbed form, in the layout TND, which takes queries as they lie and copies nothing."""
    import torch_npu
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX
    from vllm_ascend.attention.mla_v1 import AscendMLAImpl, AscendMLAMetadataBuilder

    init, decode = AscendMLAMetadataBuilder.__init__, AscendMLAImpl._forward_decode

    @functools.wraps(init)
    def __init__(self: Any, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, kv_cache_spec, layer_names, vllm_config, *args, **kwargs)
        # up to how many tokens in a step a request counts as one that decodes
        self.decode_threshold = vllm_config.scheduler_config.max_num_batched_tokens
        self.reorder_batch_threshold = self.decode_threshold

    @functools.wraps(decode)
    def _forward_decode(
        self: Any, q_nope: Any, q_pe: Any, k_nope: Any, k_pe: Any, block_size: int, attn_metadata: Any, *args: Any
    ) -> Any:
        if _EXTRA_CTX.capturing:  # steps that decode alone, in vllm-ascend's own call
            return decode(self, q_nope, q_pe, k_nope, k_pe, block_size, attn_metadata, *args)
        step = attn_metadata.decode
        keys = [k.view(-1, self.num_kv_heads, block_size, k.shape[-1]) for k in (k_nope, k_pe)]
        y, _ = torch_npu.npu_fused_infer_attention_score_v2(
            q_nope, keys[0], keys[0], query_rope=q_pe, key_rope=keys[1], num_query_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads, input_layout="TND", atten_mask=step.attn_mask, sparse_mode=3,
            softmax_scale=self.scale, block_table=step.block_table, block_size=block_size,
            actual_seq_qlen=step.actual_seq_lengths_q, actual_seq_kvlen=step.seq_lens_list,
        )  # fmt: skip
        return self._v_up_proj(y.transpose(0, 1))

    with (
        attribute(AscendMLAMetadataBuilder, "__init__", __init__),
        attribute(AscendMLAImpl, "_forward_decode", _forward_decode),
    ):
        yield


@contextlib.contextmanager
def captured_attention() -> Iterator[None]:
    """Groups of tasks and their updates are ours (`targets.acl_graph`): what they change is a tensor of lengths."""
    with contextlib.ExitStack() as stack:
        for name in (
            "graph_task_group_begin", "graph_task_group_end", "graph_task_update_begin", "graph_task_update_end"
        ):  # fmt: skip
            stack.enter_context(attribute(torch.get_device_module("npu"), name, getattr(acl_graph, name)))
        yield


@contextlib.contextmanager
def pages_of_the_cache() -> Iterator[None]:
    """A page beyond the cache is an error where the scheduler names it, on the host; the kernels read the numbers on the device alone."""
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    plain = NPUModelRunner._update_states

    @functools.wraps(plain)
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        check_pages(self.kv_cache_config.num_blocks, scheduler_output)
        return plain(self, scheduler_output)

    with attribute(NPUModelRunner, "_update_states", _update_states):
        yield


def check_pages(there: int, scheduler_output: Any) -> None:
    """Raise ValueError for a request that vLLM's SchedulerOutput gives a page beyond the cache's `there`."""
    cached = scheduler_output.scheduled_cached_reqs
    given = [(new.req_id, new.block_ids) for new in scheduler_output.scheduled_new_reqs]
    for request, groups in (*given, *zip(cached.req_ids, cached.new_block_ids, strict=True)):
        page = max((max(pages, default=0) for pages in groups or ()), default=0)
        if page >= there:
            raise ValueError(
                f"the scheduler gives request {request} page {page} of a key cache that has {there}: attention would read memory that is "
                "not the cache's. Start the engine again, without a kv_transfer_config if it has one"
            )


def check_config(model_config: Any) -> None:
    """Raise HostError for a model whose attention chooses its keys by an indexer, before it loads."""
    if getattr(getattr(model_config, "hf_text_config", None), "index_topk", None) is not None:
        raise HostError(
            f"{model_config.model} has sparse attention (index_topk, as DeepSeek-V3.2): its indexer's products and its attention run in "
            "kernels of vllm-ascend (AscendSFAImpl) about which nothing is known: serve a model with ordinary or latent attention"
        )


def check_graph_mode(mode: Any) -> None:
    """Raise HostError where attention of this kind cannot be captured. `mode`: vLLM's CUDAGraphMode, or None."""
    if mode is not None and mode.has_full_cudagraphs() and ascendc.attention() is not None:
        raise HostError(
            f"cudagraph_mode={mode.name} captures attention, and AscendC's of the package batch_invariant_ops, which serves it here, "
            "is captured with a workspace of its own (from release 2.0.0 on; SGLang does it), where vllm-ascend brings that of torch_npu's "
            "operator: this was not tried, so write "
            'compilation_config={"cudagraph_mode": "PIECEWISE"}, or uninstall the package to use the Triton kernel'
        )


def check_layers(vllm_config: Any) -> None:
    """Every attention layer calls operators that the table has.

    Raises:
        HostError: sparse attention, a state space, an 8-bit cache, heads of 512 on A2 and A3, sinks.
    """
    for layer, impl in attention_layers(vllm_config):
        what = _unknown(vllm_config, impl)
        if what is not None:
            raise HostError(
                f"{layer} has {what} for attention, which vllm-ascend calls between the compiled graphs and about which nothing is known: "
                "serve a model with ordinary or latent attention"
            )


def _unknown(vllm_config: Any, impl: Any) -> str | None:
    """What the table does not have of an attention layer's implementation."""
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.attention.attention_v1 import AscendAttentionBackendImpl
    from vllm_ascend.attention.mla_v1 import AscendMLAImpl
    from vllm_ascend.attention.utils import using_paged_attention

    if type(impl) is AscendMLAImpl:
        if impl.fa_quant_layer:
            return "an 8-bit latent cache (fa_quant_layer)"
        if impl.enable_kv_nz:
            return "a latent cache in the NZ format (enable_kv_nz)"
        return "mlapo (enable_mlapo)" if impl.enable_mlapo else None
    if type(impl).__name__.startswith(("AscendSFA", "AscendDSA")):
        return f"sparse attention ({type(impl).__name__}, as DeepSeek-V3.2 has)"
    if type(impl) is not AscendAttentionBackendImpl:
        return type(impl).__name__
    if any(using_paged_attention(n, vllm_config, impl.head_size) for n in (1, *get_ascend_config().pa_shape_list)):
        return f"_npu_paged_attention (heads of {impl.head_size}, or pa_shape_list)"
    if impl.sinks is not None:
        return "npu_fused_infer_attention_score_v2, with sinks,"
    # vllm-ascend's main of August 2026 has this no more
    return "sparse attention (enable_hamming_sparse)" if getattr(impl, "enable_hamming_sparse", False) else None
