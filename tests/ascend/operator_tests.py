"""vllm-ascend's own tests of its batch-invariant operators, run on PyTorch's functions under `bi_compile.invariant`.

    python tests/ascend/operator_tests.py test_batch_invariant_ops.py [pytest's arguments]

The file is vllm-ascend/tests/e2e/nightly/single_node/ops/singlecard_ops/triton/test_batch_invariant_ops.py of its main branch;
it is not kept here. What it imports from vllm_ascend are here the functions of PyTorch that a program calls: torch.mm,
addmm, bmm(out=), linear, mean, rms_norm and softmax, with the replacements at the dispatcher. Without an NPU it runs on the
emulated one (LD_LIBRARY_PATH with the stand-ins for CANN, TRITON_INTERPRET=1); on an NPU machine, on the NPU.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import pytest
import torch
import torch_npu  # noqa: F401
from torch import Tensor
from torch.nn import functional

import bi_compile
from bi_compile.options import Options


def mean_dim(x: Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    return torch.mean(x, dim, keepdim, dtype=dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


def product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.mm(x, y) if bias is None else torch.addmm(bias, x, y)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


#: module below vllm_ascend.ops.triton -> its functions
MODULES: dict[str, dict[str, Callable[..., Any]]] = {
    "batch_invariant.matmul": {
        "mm_batch_invariant": torch.mm, "addmm_batch_invariant": torch.addmm, "bmm_batch_invariant": torch.bmm,
        "linear_batch_invariant": functional.linear, "matmul_batch_invariant": torch.matmul, "matmul_persistent": product,
        "linear_persistent": linear,
    },
    "batch_invariant.mean": {"mean_batch_invariant": torch.mean, "mean_dim": mean_dim},
    "batch_invariant.rmsnorm": {"rms_norm": rms_norm},
    "batch_invariant.softmax": {"softmax_batch_invariant": torch.softmax},
    "triton_utils": {"init_device_properties_triton": lambda: None},
}  # fmt: skip


def main(arguments: list[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        import emulated_npu

        emulated_npu.install()
    for name, functions in MODULES.items():
        package = "vllm_ascend.ops.triton"
        for part in (*package.split(".")[:1], "vllm_ascend.ops", package, f"{package}.{name}".rpartition(".")[0]):
            sys.modules[part] = types.ModuleType(part)
        module = types.ModuleType(f"{package}.{name}")
        vars(module).update(functions)
        sys.modules[module.__name__] = module
    with bi_compile.invariant(Options(target="ascend-a2"), "npu"):
        return int(pytest.main(["-p", "no:cacheprovider", "-q", *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
