"""Residual add and RMS normalisation in one operator."""

from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, replaces

from .rms_norm import RmsNorm

WHY = "the row sum's split follows the number of rows"


class AddRmsNorm(Pass):
    """(x + residual) and its RMS normalisation, the row sum in one fixed order."""

    name = "add_rms_norm"

    @replaces(
        "npu.npu_add_rms_norm.default",
        why="AclnnAddRmsNorm chooses its tiling, and with it the order of the row sum, from the number of rows",
        source="vllm-ascend PR 6910, batch_invariant.py",
    )
    def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
        return ops.add_rms_norm(x1, x2, gamma, epsilon)

    @replaces(
        "vllm_ir.fused_add_rms_norm.default",
        "vllm_ir.fused_add_rms_norm.maybe_inplace",
        why=WHY,
        source="vllm/ir/ops/layernorm.py: lowered to a kernel or to a mean that the compiler tiles",
    )
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if variance_size is not None:
            residual = (x.float() + x_residual.float()).to(x.dtype)
            return RmsNorm.rms_norm_ir(residual, weight, epsilon, variance_size), residual
        y, _, residual = ops.add_rms_norm(x, x_residual, weight, epsilon)
        return y, residual
