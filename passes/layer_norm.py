"""Layer and group normalisation, as operators and taken apart."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bi_compile import ops
from bi_compile.table import Pass, Pattern

aten = torch.ops.aten
NPU = "a fused kernel that chooses its tiling from the number of rows"
NPU_SOURCE = "assumed from AclnnAddRmsNorm (vllm-ascend PR 6910); not measured"


def _plain_layer_norm(x: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def as_rows(input: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    """input [..., *normalized_shape] as [..., C].

    Raises:
        RuntimeError: it has another shape, or none.
    """
    k = len(normalized_shape)
    torch._check(
        0 < k <= input.dim() and list(input.shape[-k:]) == list(normalized_shape),
        lambda: f"an input of {list(input.shape)} has no last dimensions of normalized_shape={list(normalized_shape)}",
    )
    return input if k == 1 else input.flatten(-k)


def _statistic(input: Tensor, *params: Tensor | None) -> torch.dtype:
    """The dtype that PyTorch gives mean and rstd: the input's, or float32 beside parameters that are wider.

    PyTorch's fake implementation knows nothing of the latter, and what was traced with it expects the input's dtype.
    """
    mixed = any(p is not None and p.dtype != input.dtype for p in params)
    return torch.float32 if mixed and not isinstance(input, FakeTensor) else input.dtype


class LayerNorm(Pass):
    """layer_norm and group_norm, mean and variance in one fixed order."""

    name = "layer_norm"
    why = "mean and variance are summed in an order that follows the number of rows"
    source = "aten/src/ATen/native/cuda/layer_norm_kernel.cu; Inductor lowers it to a reduction that it tiles by the number of rows"
    patterns = (
        Pattern(
            "layer_norm",
            search=_plain_layer_norm,
            replace=lambda x, eps: ops.layer_norm(x, None, None, eps)[0],
            examples=lambda: [torch.empty(8, 64)],
            scalars={"eps": 1.23e-5},
        ),
    )


@LayerNorm.replaces(aten.native_layer_norm.default)
def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    k = len(normalized_shape)
    rows = as_rows(input, normalized_shape)
    y, mean, rstd = ops.layer_norm(rows, *(p if p is None else p.reshape(-1) for p in (weight, bias)), eps)
    stat = (*input.shape[: input.dim() - k], *[1] * k)
    if input.device.type == "cpu":  # elsewhere they stay in float32
        dtype = _statistic(input, weight, bias)
        mean, rstd = mean.to(dtype), rstd.to(dtype)
    return y.view(input.shape), mean.view(stat), rstd.view(stat)


@LayerNorm.replaces(
    aten.native_group_norm.default,
    why="a group's statistics are summed in an order that follows the number of rows",
)
def native_group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = ops.group_norm(input, weight, bias, group, eps)
    dtype = _statistic(input, weight, bias)
    return y, mean.to(dtype), rstd.to(dtype)


@LayerNorm.replaces("npu.npu_layer_norm_eval.default", why=NPU, source=NPU_SOURCE)
def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


@LayerNorm.replaces("npu.npu_add_layer_norm.default", why=NPU, source=NPU_SOURCE)
def npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5, additional_output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x1 + x2
    y, mean, rstd = ops.layer_norm(s, gamma, beta, epsilon)
    return y, mean, rstd, s


@LayerNorm.replaces("npu.npu_group_norm_silu.default", why=NPU, source=NPU_SOURCE)
def npu_group_norm_silu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, group: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = ops.group_norm(input, weight, bias, group, eps)
    dtype = input.dtype if weight is None or bias is None else weight.dtype
    return torch.nn.functional.silu(y), mean.to(dtype), rstd.to(dtype)
