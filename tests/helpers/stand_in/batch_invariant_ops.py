"""A STAND-IN for AscendC's package of that name, which is Huawei's and only for NPU machines: the operators that vllm-ascend and SGLang
take from it, under their names and with their arguments, computed by the CPU in float32. `CALLS` counts what was called.

Its schemas: the attention's are those of torch_npu's npu_fused_infer_attention_score, in whose place vllm-ascend puts it; the
others' are how vllm-ascend's batch_invariant.py and SGLang's npu_batch_invariant_ops.py call them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import emulated_npu
import torch
from torch import Tensor

CALLS: Counter[str] = Counter()
_library = torch.library.Library("batch_invariant_ops", "DEF")
_native = emulated_npu.Native(perturb=False)


def _attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return _native.attention(query, key, value, **arguments)


def _attention_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    out: Sequence[Tensor],
    workspace: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    out[0].copy_(_attention(query, key, value, **arguments)[0])
    return out[0], out[1]


def _theirs(overload: str) -> str:
    """The arguments and results of torch_npu's operator."""
    schema = str(getattr(torch.ops.npu.npu_fused_infer_attention_score, overload)._schema)
    return schema[schema.index("(") :]


def _last(x: Tensor, dim: int) -> int:
    """Callers move every other dimension to the end."""
    assert dim in (-1, x.dim() - 1), dim
    return dim


_ATTENTION = "npu_fused_infer_attention_score_batch_invariant"
_OPERATORS: dict[str, Callable[..., Any]] = {
    "npu_mm_batch_invariant(Tensor a, Tensor b) -> Tensor": lambda a, b: (a.float() @ b.float()).to(a.dtype),
    "npu_matmul_batch_invariant(Tensor a, Tensor b) -> Tensor": lambda a, b: (a.float() @ b.float()).to(a.dtype),
    "npu_reduce_sum_batch_invariant(Tensor x, int dim, bool keepdim=False) -> Tensor": lambda x, dim, keepdim=False: (
        x.sum(_last(x, dim), keepdim)
    ),
    "npu_reduce_mean_batch_invariant(Tensor x, int dim, bool keepdim=False) -> Tensor": lambda x, dim, keepdim=False: (
        x.mean(_last(x, dim), keepdim)
    ),
    "npu_log_softmax_batch_invariant(Tensor x, int dim) -> Tensor": lambda x, dim: x.log_softmax(dim),
    f"{_ATTENTION}{_theirs('default')}": _attention,
    f"{_ATTENTION}.out{_theirs('out')}": _attention_out,
}


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return function(*args, **kwargs)

    return emulated_npu.on_host(run, f"batch_invariant_ops::{name}")


for _schema, _function in _OPERATORS.items():
    _name = _schema.split("(")[0]
    _library.define(_schema)
    _library.impl(_name, _counted(_name, _function), "PrivateUse1")
