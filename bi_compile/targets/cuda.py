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
    },
)


def _here(compiled: bool) -> Target:
    return TARGET


DEVICE = Device("cuda", "CUDA", "bi_compile.kernels.cuda", (TARGET,), _here)
