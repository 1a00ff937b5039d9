"""CUDA devices, with Inductor's Triton as the compiler."""

from collections.abc import Mapping

from .inductor_cpp import one_code
from .target import ROUND_EVERY_OPERATOR, Device, Target


def _native() -> Mapping[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    from ..kernels import cuda

    return cuda.rests_on()


#: kernels of vLLM's model runner (vllm/v1/worker/gpu and block_table.py of 0.23), which it launches around the model
_RUNNERS_KERNELS = (
    "prepare_prefill_inputs prepare_pos_seq_lens combine_sampled_and_draft_tokens get_num_sampled_and_rejected post_update "
    "post_update_num_computed_tokens expand_idx_mapping gather_block_tables compute_slot_mappings compute_slot_mapping apply_write "
    "temperature gumbel_sample topk_log_softmax ranks fill_logprob_token_ids min_p penalties bincount bias bad_words "
    "prompt_logprobs_token_ids zero_kv_blocks apply_grammar_bitmask"
).split()
_RUNNERS_REASON = (
    "vLLM's model runner: each program reads and writes one request's tokens, pages or logits, in blocks of one size; what it adds up "
    "atomically are integers"
)

TARGET = Target(
    name="cuda",
    device="cuda",
    native=_native,
    inductor=ROUND_EVERY_OPERATOR,
    before_codegen=one_code,  # a graph may hold tensors of the host
    trusted={
        "vllm.unified_attention_with_output.default": "FlashAttention 3 and vLLM's Triton attention compute each query by itself, its keys in "
        "ascending or descending tiles of one size, once they are told the same lengths for every batch (bi_compile/vllm/cuda.py, which "
        "refuses other attention)",
        "vllm.unified_kv_cache_update.default": "copies keys and values into their slots",
        "_vllm_fa3_C.get_scheduler_metadata.default": "plans which block computes which query's tile; bi_compile/vllm/cuda.py tells it the "
        "same lengths, and one part of the keys, for every batch",
        "_C.weak_ref_tensor.default": "another name for the same memory",
        "triton._topk_topp_kernel": "vLLM's top-k and top-p: one program takes one row at a time, in blocks of one size; "
        "bi_compile/vllm/cuda.py has it for every batch, which vLLM 0.23 sorts where it is small",
        **{f"triton._{name}_kernel": _RUNNERS_REASON for name in _RUNNERS_KERNELS},
    },
)


def _here(compiled: bool) -> Target:
    return TARGET


DEVICE = Device("cuda", "CUDA", "bi_compile.kernels.cuda", (TARGET,), _here)
