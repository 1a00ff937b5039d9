"""Residual add and RMS normalisation in one operator."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bi_compile import ops
from bi_compile.table import Pass, Pattern, refuse

from .rms_norm import rms_norm_ir

#: the source of the entries for fused operators, which no model calls
FUSED = "torch_npu's and vllm-ascend's fusion passes put it back (add_rms_norm_cast, add_rms_norm_quant, add_rms_norm_dynamic_quant)"


def _int8_alone(operator: str, dtype: dict[str, int | None]) -> None:
    """Refuses another dtype of the result than int8, which torch_npu numbers 1."""
    if named := [name for name, value in dtype.items() if value not in (None, 1)]:
        refuse(operator, named, "leave the argument out, or switch the fusion off that makes it")


def _scaled(y: Tensor, scale: Tensor, zero_point: Tensor | None, divide: bool) -> Tensor:
    """y / scale (or y * scale) + zero_point, to the nearest int8, half to even."""
    y = y.float() / scale.float() if divide else y.float() * scale.float()
    if zero_point is not None:
        y = y + zero_point.float()
    return y.round().clamp(-128, 127).to(torch.int8)


def _one_kind(x: Tensor, residual: Tensor, eps: float, w: Tensor | None = None) -> bool:
    pairs = zip(x.shape, residual.shape, strict=False)
    return (
        (x.dtype, x.device, x.dim()) == (residual.dtype, residual.device, residual.dim())
        and all(statically_known_true(a == b) for a, b in pairs)
        and (w is None or w.shape == x.shape[-1:])
    )


def _sum_and_norm(x: Tensor, residual: Tensor, w: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    s = x + residual
    return ops.rms_norm(s, w, eps)[0], s


def _both(x: Tensor, residual: Tensor, w: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, s = ops.add_rms_norm(x, residual, w, eps)
    return y, s


class AddRmsNorm(Pass):
    """(x + residual) and its RMS normalisation, the row sum in one fixed order, as one operator also where a model adds first."""

    name = "add_rms_norm"
    why = "AclnnAddRmsNorm chooses its tiling, and with it the order of the row sum, from the number of rows"
    source = "vllm-ascend PR 6910, batch_invariant.py"
    patterns = (
        Pattern(
            "add, rms_norm",
            search=_sum_and_norm,
            replace=_both,
            examples=lambda: [torch.empty(8, 64), torch.empty(8, 64), torch.empty(64)],
            scalars={"eps": 1.23e-6},
            fits=_one_kind,
        ),
        Pattern(
            "add, rms_norm",
            search=lambda x, residual, eps: _sum_and_norm(x, residual, None, eps),
            replace=lambda x, residual, eps: _both(x, residual, None, eps),
            examples=lambda: [torch.empty(8, 64), torch.empty(8, 64)],
            scalars={"eps": 1.23e-6},
            fits=_one_kind,
        ),
    )


@AddRmsNorm.replaces("npu.npu_add_rms_norm.default")
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return ops.add_rms_norm(x1, x2, gamma, epsilon)


@AddRmsNorm.replaces("_C_ascend.npu_add_rms_norm_bias.default")
def npu_add_rms_norm_bias(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd, s = ops.add_rms_norm(x1, x2, gamma, epsilon)
    return (y if beta is None else y + beta), rstd, s


@AddRmsNorm.replaces("npu.npu_add_rms_norm_cast.default", source=FUSED)
def npu_add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, rstd, s = ops.add_rms_norm(x1, x2, gamma, epsilon)
    return y.float(), y, rstd, s


@AddRmsNorm.replaces("npu.npu_add_rms_norm_quant.default", source=FUSED)
def npu_add_rms_norm_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, scales1: Tensor, zero_points1: Tensor | None, beta: Tensor | None = None,
    scales2: Tensor | None = None, zero_points2: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-6,
    div_mode: bool = True, dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _int8_alone("npu_add_rms_norm_quant", {"dst_type": dst_type})
    y, _, s = ops.add_rms_norm(x1, x2, gamma, epsilon)
    y = y if beta is None else y + beta
    first = _scaled(y, scales1, zero_points1, div_mode)
    return first, first.clone() if scales2 is None else _scaled(y, scales2, zero_points2, div_mode), s


@AddRmsNorm.replaces("npu.npu_add_rms_norm_dynamic_quant.default", source=FUSED)
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, *, smooth_scale1: Tensor | None = None, smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None, epsilon: float = 1e-6, output_mask: Sequence[bool] | None = None, y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _int8_alone("npu_add_rms_norm_dynamic_quant", {"y_dtype": y_dtype})
    y, _, s = ops.add_rms_norm(x1, x2, gamma, epsilon)
    y = (y if beta is None else y + beta).float()
    both = smooth_scale1 is not None and smooth_scale2 is not None
    wanted = (True, both) if output_mask is None else tuple(output_mask)
    quantised, scales = [], []
    for out, smooth in zip(wanted, (smooth_scale1, smooth_scale2), strict=True):
        smoothed = y if smooth is None else y * smooth.float()
        # a maximum comes out the same in every order
        scale = smoothed.abs().amax(-1) / 127
        quantised.append(
            _scaled(smoothed, scale.unsqueeze(-1), None, True) if out else y.new_empty(0, dtype=torch.int8)
        )
        scales.append(scale if out else y.new_empty(0))
    return *quantised, s, *scales


@AddRmsNorm.replaces(
    "vllm_ir.fused_add_rms_norm.default",
    "vllm_ir.fused_add_rms_norm.maybe_inplace",
    why="the row sum's split follows the number of rows",
    source="vllm/ir/ops/layernorm.py: lowered to a kernel or to a mean that the compiler tiles",
)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    if variance_size is not None:
        residual = (x.float() + x_residual.float()).to(x.dtype)
        return rms_norm_ir(residual, weight, epsilon, variance_size), residual
    y, _, residual = ops.add_rms_norm(x, x_residual, weight, epsilon)
    return y, residual
