"""Attention of vLLM on a CPU, in the order of `ops.scaled_dot_product_attention`: what is served and what is trained agree."""

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass


class CpuAttention(Pass):
    """vLLM's attention over a paged cache, and the writes to that cache.

    vLLM lays keys out for its own kernel; here they lie as they are. So both operators are replaced, or neither is.
    """

    name = "cpu_attention"
    why = "its sums follow the processor's kernel (AMX, AVX512) and page size, so that no other program has its bits"
    source = "vLLM csrc/cpu/cpu_attn_impl.hpp; measured: PyTorch's attention of the same model gives other logprobs"


def _quantised(*args: object, **kwargs: object) -> bool:
    """8-bit keys (kv_cache_dtype, wherever it stands) stay with vLLM's kernel, invariant once its split of the keys is off."""
    return any(isinstance(a, str) and a.startswith("fp8") for a in (*args, *kwargs.values()))


@CpuAttention.replaces("_C.cpu_attn_reshape_and_cache.default", targets=["cpu", "cpu_eager"], unless=_quantised)
def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, isa: str, k_scale: float = 1.0,
    v_scale: float = 1.0, kv_cache_dtype: str = "auto",
) -> None:  # fmt: skip
    """key [T, Hkv, D] to key_cache [pages, Hkv, page size, D] at slot_mapping [T]: page * page size + place; -1 is nowhere."""
    write = torch.ops.bi_compile_cpu.write_pages_.default
    for cache, rows in ((key_cache, key), (value_cache, value)):
        write(cache.transpose(1, 2), rows, slot_mapping[: key.shape[0]])


@CpuAttention.replaces("_C.cpu_attention_with_kv_cache.default", targets=["cpu", "cpu_eager"], unless=_quantised)
def attention_with_kv_cache(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, output: Tensor, query_start_loc: Tensor, seq_lens: Tensor, scale: float,
    causal: bool, alibi_slopes: Tensor | None, sliding_window_size: int, block_table: Tensor, softcap: float, scheduler_metadata: Tensor,
    s_aux: Tensor | None, dynamic_causal: Tensor | None, k_scale: float = 1.0, v_scale: float = 1.0, kv_cache_dtype: str = "auto",
) -> None:  # fmt: skip
    """query [T, Hq, D], output like it; query_start_loc [R + 1]; seq_lens [R]; block_table [R, pages]."""
    if dynamic_causal is not None:
        raise NotImplementedError(
            "bi_compile: attention that is causal for some requests only (dynamic_causal) has no replacement: serve a decoder"
        )
    window = None if sliding_window_size < 0 else sliding_window_size - 1
    lengths = torch.stack([query_start_loc[1:], seq_lens]).int()
    y, _ = ops.paged_attention(
        query, key_cache.transpose(1, 2), value_cache.transpose(1, 2), lengths, block_table.int(), scale=scale, left=window,
        right=0 if causal else window, softcap=softcap or None, alibi_slopes=alibi_slopes, sinks=s_aux,
    )  # fmt: skip
    output.copy_(y.view_as(output))
