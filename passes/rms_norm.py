"""RMS normalisation, as an operator and taken apart."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, Pattern

from .layer_norm import as_rows


def _plain(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(torch.mean(x.pow(2), -1, keepdim=True) + eps)


def _pattern(dtype: torch.dtype, search: Callable[..., Tensor], weight: torch.dtype | None = None) -> Pattern:
    """For x of `dtype` and a weight of the dtype `weight`, or none."""

    def weighted(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return ops.rms_norm(x, w, eps)[0]

    def bare(x: Tensor, eps: float) -> Tensor:
        return ops.rms_norm(x, None, eps)[0]

    def fits(x: Tensor, eps: float, w: Tensor | None = None) -> bool:
        return x.dtype == dtype and (w is None or (w.dtype == weight and w.shape == x.shape[-1:]))

    def examples() -> list[Tensor]:
        return [torch.empty(8, 64, dtype=dtype), *([] if weight is None else [torch.empty(64, dtype=weight)])]

    return Pattern("rms_norm", search, bare if weight is None else weighted, examples, {"eps": 1.23e-6}, fits)


def _cast(dtype: torch.dtype) -> Iterator[Pattern]:
    """With the casts and the weight that models write around it, either factor first; the largest come first."""
    wide = torch.float32
    yield _pattern(dtype, lambda x, w, eps: _plain(x.float(), eps).to(dtype) * w, dtype)
    yield _pattern(dtype, lambda x, w, eps: w * _plain(x.float(), eps).to(dtype), dtype)
    yield _pattern(dtype, lambda x, w, eps: (_plain(x.float(), eps) * w).to(dtype), wide)
    yield _pattern(dtype, lambda x, w, eps: (w * _plain(x.float(), eps)).to(dtype), wide)
    yield _pattern(dtype, lambda x, eps: _plain(x.float(), eps).to(dtype))


class RmsNorm(Pass):
    """RMS normalisation, the row sum in one fixed order."""

    name = "rms_norm"
    why = "the row sum's split follows the number of rows"
    source = (
        "measured under Inductor on an H100: compiled Qwen3 changes from batch 8, and batch 1 has a graph of its own"
    )
    patterns = (
        *_cast(torch.bfloat16),
        *_cast(torch.float16),
        _pattern(torch.float32, lambda x, w, eps: _plain(x, eps) * w, torch.float32),
        _pattern(torch.float32, lambda x, w, eps: w * _plain(x, eps), torch.float32),
        # whatever x is, and what is done with it
        dataclasses.replace(_pattern(torch.float32, _plain), fits=None),
    )


@RmsNorm.replaces("aten._fused_rms_norm.default")
def fused_rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    k = len(normalized_shape)
    rows = as_rows(input, normalized_shape)
    # PyTorch's default: the eps of the dtype in which it computes
    eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps if eps is None else eps
    y, rstd = ops.rms_norm(rows, weight if weight is None else weight.reshape(-1), eps)
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
