"""vLLM's experts on a CPU, rounded as transformers' are: what is served and what is trained agree."""

from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass


class CpuMoe(Pass):
    """vLLM's fused experts, and the packing of their weights.

    vLLM packs the weights for its own kernel; here they lie as they are. So both operators are replaced, or neither is.
    """

    name = "cpu_moe"
    why = "its sums follow the processor's kernel (AMX, AVX512) and it rounds where no other program does"
    source = "vLLM csrc/cpu/cpu_fused_moe.cpp; transformers/integrations/moe.py (grouped_mm_experts_forward)"


@CpuMoe.replaces("_C.prepack_moe_weight.default", targets=["cpu_eager"])
def prepack_moe_weight(weight: Tensor, packed_weight: Tensor, isa: str) -> None:
    packed_weight.copy_(weight)


@CpuMoe.replaces("_C.cpu_fused_moe.default", targets=["cpu", "cpu_eager"])
def cpu_fused_moe(
    output: Tensor, input: Tensor, w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None, topk_weights: Tensor,
    topk_id: Tensor, skip_weighted: bool, act: str, isa: str,
) -> None:  # fmt: skip
    weights = None if skip_weighted else topk_weights
    output.copy_(ops.moe_experts(input, w13, w2, topk_id, weights, act, w13_bias, w2_bias))
