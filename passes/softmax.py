"""softmax and log_softmax, as operators and taken apart."""

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, Pattern

aten = torch.ops.aten


def _plain_softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - torch.amax(x, -1, keepdim=True))
    return e / torch.sum(e, -1, keepdim=True)


def _plain_log_softmax(x: Tensor) -> Tensor:
    shifted = x - torch.amax(x, -1, keepdim=True)
    return shifted - torch.log(torch.sum(torch.exp(shifted), -1, keepdim=True))


class Softmax(Pass):
    """softmax and log_softmax, their row sum taken in one fixed order."""

    name = "softmax"
    why = "the row sum's split follows the number of rows"
    source = "vllm-ascend PR 6910 (aclnnSoftmax); aten/src/ATen/native/cuda/SoftMax.cu; Inductor lowers it to tiled reductions"
    patterns = (
        Pattern("softmax", _plain_softmax, lambda x: ops.softmax(x, -1), lambda: [torch.empty(8, 64)], {}),
        Pattern("log_softmax", _plain_log_softmax, lambda x: ops.log_softmax(x, -1), lambda: [torch.empty(8, 64)], {}),
    )


@Softmax.replaces(aten._softmax.default)
def softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return ops.softmax(self, dim, dtype=torch.float32 if half_to_float else None)


@Softmax.replaces(aten._log_softmax.default)
def log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return ops.log_softmax(self, dim, dtype=torch.float32 if half_to_float else None)


@Softmax.replaces(aten._safe_softmax.default)
def safe_softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    dead = torch.all(self == -torch.inf, dim, keepdim=True)
    return torch.where(dead, 0.0, ops.softmax(self if self.is_floating_point() else self.to(dtype), dim, dtype=dtype))
