"""torch.sum keeps its whole meaning on npu tensors: every form arrives at the table, with the shape and dtype that it had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu  # noqa: F401  the device npu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bi_compile import Options, Pipeline
from bi_compile.ops import OPERATORS
from bi_compile.resolve import resolve_passes
from bi_compile.table import Table

FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "no dim": lambda x: torch.sum(x),
    "one dim": lambda x: torch.sum(x, 1),
    "several dims": lambda x: torch.sum(x, (0, -1)),
    "keepdim": lambda x: torch.sum(x, -1, keepdim=True),
    "dtype": lambda x: torch.sum(x, -1, dtype=torch.float32),
    "dtype, no dim": lambda x: torch.sum(x, dtype=torch.float32),
    "method": lambda x: x.sum(),
    "method with dims": lambda x: x.sum([1, 2], True),
    "out": lambda x: torch.sum(x, -1, out=x.new_empty(2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_replaced_and_keeps_shape_and_dtype(form: str) -> None:
    with FakeTensorMode():
        graph = make_fx(FORMS[form])(torch.empty(2, 3, 4, dtype=torch.float16, device="npu:0"))
    before = next(n.args[0] for n in graph.graph.nodes if n.op == "output").meta["val"]
    Pipeline(Options(target="ascend-a2")).rewrite(graph.graph, "captured")
    after = next(n.args[0] for n in graph.graph.nodes if n.op == "output").meta["val"]
    assert (after.shape, after.dtype, after.device) == (before.shape, before.dtype, before.device)
    names = [str(n.target) for n in graph.graph.nodes]
    assert "bi_compile.sum.default" in names and not [n for n in names if n.startswith("aten.sum")], names


def test_eager_code_gets_every_overload_too() -> None:
    """Also those that write into a tensor: the dispatcher sees `Tensor.sum` and `out=`, which patching torch.sum does not."""
    table = Table(resolve_passes(["bi_ascend"]), "ascend-a2")
    found = {str(op) for op in table.by_overload if str(op).startswith("aten.sum.")}
    assert {"aten.sum.default", "aten.sum.dim_IntList", "aten.sum.IntList_out", "aten.sum.out"} <= found
    # our own operator is found for the device: its kernel, or what loads the kernels at the first call
    key = "PrivateUse1"
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(OPERATORS["sum"].name(), key)
