"""RMS normalisation, as an operator and taken apart."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, Pattern


def _plain_rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(torch.mean(x.pow(2), -1, keepdim=True) + eps)


class RmsNorm(Pass):
    """RMS normalisation, the row sum in one fixed order. Where it arrives taken apart, the compiler multiplies by the weight."""

    name = "rms_norm"
    why = "the row sum's split follows the number of rows"
    source = (
        "measured under Inductor on an H100: compiled Qwen3 changes from batch 8, and batch 1 has a graph of its own"
    )
    patterns = (
        Pattern(
            "rms_norm",
            search=_plain_rms_norm,
            replace=lambda x, eps: ops.rms_norm(x, None, eps)[0],
            examples=lambda: [torch.empty(8, 64)],
            scalars={"eps": 1.23e-6},
        ),
    )


@RmsNorm.replaces("aten._fused_rms_norm.default")
def fused_rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    k = len(normalized_shape)
    flat = input.reshape(*input.shape[: input.dim() - k], math.prod(normalized_shape))
    # PyTorch's default: the eps of the dtype in which it computes
    eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps if eps is None else eps
    y, rstd = ops.rms_norm(flat, weight if weight is None else weight.reshape(-1), eps)
    return y.view(input.shape), rstd.view(*input.shape[: input.dim() - k], *[1] * k)


@RmsNorm.replaces(
    "vllm_ir.rms_norm.default",
    source="vllm/ir/ops/layernorm.py: lowered to a kernel or to a mean that the compiler tiles",
)
def rms_norm_ir(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    if variance_size is None:
        return ops.rms_norm(x, weight, epsilon)[0]
    wide = x.float()
    head = wide[..., :variance_size]
    y = wide * torch.rsqrt(ops.mean(head * head, [-1], True) + epsilon)
    return (y if weight is None else y.to(weight.dtype) * weight).to(x.dtype)


@RmsNorm.replaces(
    "npu.npu_gemma_rms_norm.default",
    source="a fused kernel about which nothing is known; AclnnAddRmsNorm varies",
)
def npu_gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return ops.rms_norm(input, gamma.float() + 1, epsilon)
