"""The CPU, with Inductor's C++ as the compiler."""

from .inductor_cpp import one_code, vector_instructions
from .target import ROUND_EVERY_OPERATOR, Device, Target

TARGET = Target(
    name="cpu",
    device="cpu",
    inductor=ROUND_EVERY_OPERATOR,
    before_codegen=one_code,
    code_for=vector_instructions,
    trusted={
        "vllm.unified_attention_with_output.default": "calls the operators that the pass cpu_attention replaces; with 8-bit keys vLLM's own, "
        "which computes each query's tile by itself once its KV split is off (VLLM_CPU_ATTN_SPLIT_KV=0, which the plugin sets); measured: "
        "rows equal alone and among others",
        "vllm.unified_kv_cache_update.default": "copies keys and values into their slots",
        "_C.onednn_scaled_mm.default": "sums of int8 are exact in int32, and the scales, zero points and bias come after the sum, each element by "
        "itself (vLLM csrc/cpu/dnnl_kernels.cpp); measured (vLLM 0.32): rows equal alone and among others",
        "_C.int8_scaled_mm_with_quant.default": "the same with AMX: each token is quantised by a scale of its own, sums of int8 are exact in int32, and "
        "the scales and the bias come after the sum, each element by itself (vLLM csrc/cpu/sgl-kernels/gemm_int8.cpp); measured (vLLM 0.32): "
        "rows of 7 weights, alone and among up to 300, equal",
        **dict.fromkeys(
            ("_C.dynamic_scaled_int8_quant.default", "_C.static_scaled_int8_quant.default"),
            "each token has a scale of its own, or all the same one (vLLM csrc/cpu/dnnl_kernels.cpp); measured (vLLM 0.32): rows equal alone and "
            "among others",
        ),
        "_C.shm_all_gather.default": "copies the ranks' rows, rank after rank (vLLM csrc/cpu/shm.cpp)",
        "c10d._allgather_base_.default": "copies the ranks' rows, rank after rank; vLLM calls it on processors without AVX-512",
        "_C.greedy_argmax.default": "each row's first maximum; measured (vLLM 0.32): rows equal alone and among others",
        "_C.fused_gumbel_argmax.default": "each row draws from a seed of its own; measured (vLLM 0.32): rows equal alone and among others",
    },
)

#: the same device without a compiler: PyTorch's own kernels run one by one
EAGER = Target(
    name="cpu_eager",
    device="cpu",
    trusted=TARGET.trusted,
    row_local={
        "aten::scatter.src": "one thread writes all that goes to one place, in the order of the indices "
        "(aten/src/ATen/native/cpu/ScatterGatherKernel.cpp)",
    },
)


def _here(compiled: bool) -> Target:
    return TARGET if compiled else EAGER


DEVICE = Device("cpu", "CPU", "bi_compile.kernels.cpu", (TARGET, EAGER), _here)
