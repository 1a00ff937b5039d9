"""CUDA devices, with Inductor's Triton as the compiler."""

from collections.abc import Mapping

from torch import fx

from .inductor_cpp import one_code
from .target import ROUND_EVERY_OPERATOR, Device, Target


def _before_codegen(graph: fx.Graph) -> None:
    from .qk_norm import join_norms

    one_code(graph)  # a graph may hold tensors of the host
    join_norms(graph)


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
    before_codegen=_before_codegen,
    trusted={
        "vllm.unified_attention_with_output.default": "FlashAttention 3 and the Triton attention of vLLM and of bi_compile compute each query by itself, its keys in "
        "ascending or descending tiles of one size, once they are told the same lengths for every batch (bi_compile/vllm/cuda_attention.py, which "
        "refuses other attention)",
        "vllm.unified_kv_cache_update.default": "copies keys and values into their slots",
        "_vllm_fa3_C.get_scheduler_metadata.default": "plans which block computes which query's tile; bi_compile/vllm/cuda_attention.py tells it the "
        "same lengths, and one part of the keys, for every batch",
        "_C.weak_ref_tensor.default": "another name for the same memory",
        "triton._topk_topp_kernel": "vLLM's top-k and top-p: one program takes one row at a time, in blocks of one size; "
        "bi_compile/vllm/cuda.py has it for every batch, which vLLM 0.23 sorts where it is small",
        **dict.fromkeys(
            ("vllm.moe_forward.default", "vllm.moe_forward_shared.default"),
            "what it runs is judged by itself while the engine warms up (bi_compile/vllm/cuda_experts.py)",
        ),
        "triton.fused_moe_kernel": "vLLM's product of each token with its experts: K in one ascending sum, in tiles whose bits were compared on "
        "this device (bi_compile/vllm/cuda_experts.py)",
        "triton._sum_experts": "bi_compile's sum over a token's experts, in the router's order",
        **dict.fromkeys(
            ("_moe_C.topk_softmax.default", "_moe_C.topk_sigmoid.default", "_moe_C.grouped_topk.default"),
            "vLLM's routers: a token's scores are taken and its experts chosen by the same threads in every batch, of equal ones the lowest "
            "index (csrc/moe of vLLM; tests/vllm/experts_on_cuda.py compares rows alone and in batches)",
        ),
        "_moe_C.moe_align_block_size.default": "places tokens by their experts; where a token stands changes no sum",
        **dict.fromkeys(
            [f"_C.{name}_and_mul.default" for name in ("silu", "gelu", "gelu_tanh", "swigluoai")],
            "vLLM's activations, each element by itself (csrc/activation_kernels.cu)",
        ),
        **{f"triton._{name}_kernel": _RUNNERS_REASON for name in _RUNNERS_KERNELS},
    },
)


def _here(compiled: bool) -> Target:
    return TARGET


DEVICE = Device("cuda", "CUDA", "bi_compile.kernels.cuda", (TARGET,), _here)
