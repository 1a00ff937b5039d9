"""Matrix products."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, refuse

aten = torch.ops.aten
ACLNN = "AclnnMatmul splits K by the number of rows"


def _exact(*args: Any, **kwargs: Any) -> bool:
    """Integers add up the same in every order."""
    return not any(isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) for a in args)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class Matmul(Pass):
    """Products whose sums over K do not follow the number of rows."""

    name = "matmul"
    why = "the library splits K, and with it the order of the sum, by the number of rows"
    source = "measured on an H100: cuBLAS changes row 0 from M=32 (4096x4096) and M=128 (K=12288); on CPUs MKL and oneDNN choose by M"


@Matmul.replaces(aten.mm.default, unless=_exact)
def mm(self: Tensor, mat2: Tensor) -> Tensor:
    return ops.mm(self, mat2)


@Matmul.replaces(aten.addmm.default, unless=_exact)
def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return ops.addmm(self, mat1, mat2, beta=beta, alpha=alpha)


@Matmul.replaces(aten.bmm.default, unless=_exact)
def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    return ops.bmm(self, mat2)


@Matmul.replaces(aten.baddbmm.default, unless=_exact)
def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return ops.baddbmm(self, batch1, batch2, beta=beta, alpha=alpha)


@Matmul.replaces(aten.addbmm.default, unless=_exact)
def addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    # the products of a batch, added up, are one product over batch and K
    wide, tall = batch1.permute(1, 0, 2).flatten(1), batch2.flatten(0, 1)
    return ops.addmm(self, wide, tall, beta=beta, alpha=alpha)


@Matmul.replaces(aten.mv.default, unless=_exact)
def mv(self: Tensor, vec: Tensor) -> Tensor:
    return ops.mm(self, vec.unsqueeze(1)).squeeze(1)


@Matmul.replaces(aten.addmv.default, unless=_exact)
def addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return ops.addmm(self.reshape(-1, 1), mat, vec.unsqueeze(1), beta=beta, alpha=alpha).squeeze(1)


@Matmul.replaces(aten.dot.default, unless=_exact)
def dot(self: Tensor, tensor: Tensor) -> Tensor:
    return ops.mm(self.unsqueeze(0), tensor.unsqueeze(1)).reshape(())


@Matmul.replaces(aten.linear.default, unless=_exact)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() == 1:  # PyTorch then takes no bias
        return matmul(input, weight)
    x = _rows(input)
    y = ops.mm(x, weight.t()) if bias is None else ops.addmm(bias, x, weight.t())
    return y.view(*input.shape[:-1], weight.shape[0])


@Matmul.replaces(aten.matmul.default, unless=_exact)
def matmul(self: Tensor, other: Tensor) -> Tensor:
    a = self.unsqueeze(0) if self.dim() == 1 else self
    b = other.unsqueeze(1) if other.dim() == 1 else other
    if b.dim() == 2:
        out = ops.mm(_rows(a), b).view(*a.shape[:-1], b.shape[1])
    else:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        pair = [x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:]) for x in (a, b)]
        out = ops.bmm(*pair).view(*batch, a.shape[-2], b.shape[-1])
    if self.dim() == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if other.dim() == 1 else out


@Matmul.replaces(
    "vllm.unquantized_gemm.default",
    "npu.npu_linear.default",
    why=ACLNN,
    source="vllm-ascend PR 6910; vllm_ascend/ops/linear.py: every product of its graphs is such an operator",
)
def unquantized_gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias)


@Matmul.replaces("npu.npu_bmmV2.default", why=ACLNN, source="vllm-ascend PR 6910")
def npu_bmm(input: Tensor, mat2: Tensor, output_sizes: list[int]) -> Tensor:
    if output_sizes:
        refuse("npu_bmmV2", ["output_sizes"], "call torch.bmm and reshape")
    return ops.bmm(input, mat2)


@Matmul.replaces("aten._grouped_mm.default")
def grouped_mm(
    self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    if out_dtype not in (None, self.dtype):
        refuse("_grouped_mm", [f"out_dtype={out_dtype}"], "leave it out, and cast the result")
    if offs is None:
        return ops.bmm(self, mat2) if bias is None else ops.baddbmm(bias.unsqueeze(1), self, mat2)
    if mat2.dim() != 3:
        divided = "K" if self.dim() == 2 else "the columns of mat2"
        refuse(
            "_grouped_mm",
            [f"an offs that divides {divided}"],
            "it has one where offs divides the rows of the first operand, as a mixture of experts does; call torch.mm for each group",
        )
    return ops.grouped_mm(self, mat2, offs, bias)


@Matmul.replaces(
    "transformers.grouped_mm_fallback.default",
    why="a product for each expert",
    source="transformers/integrations/moe.py: torch.mm of each group",
)
def grouped_mm_fallback(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return ops.grouped_mm(input, weight, offs)


@Matmul.replaces(
    aten._scaled_mm.default,
    "aten._scaled_grouped_mm.default",
    source="cuBLASLt chooses its algorithm by M",
)
def scaled_mm(*args: Any, **kwargs: Any) -> NoReturn:
    refuse(
        "a scaled product",
        ["float8 operands"],
        "serve the model in bfloat16 or float16, or replace the operator in a pass of yours",
    )
