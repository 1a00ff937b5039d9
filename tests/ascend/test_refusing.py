"""npugraph_ex puts fused norms back; with our pass the graph that it executes has none."""

from __future__ import annotations

from collections import Counter

import npu_layers
import pytest
import torch
import torch_npu
import torch_npu.dynamo  # makes npugraph_ex importable
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bi_compile import AuditError, Options
from bi_compile.vllm.ascend import AscendPass, into_compiler


def cast(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y, _, new = torch_npu.npu_add_rms_norm(x, residual, gamma, 1e-6)
    return y, new, y.to(torch.float32)


def quant(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    y, _, new = torch_npu.npu_add_rms_norm(x, residual, gamma, 1e-6)
    return torch_npu.npu_quantize(y, scale, None, torch.qint8, -1, True), new


def executed(function: object, monkeypatch: pytest.MonkeyPatch, ours: AscendPass | None) -> Counter[str]:
    """The operators that npugraph_ex executes of the function."""
    import npugraph_ex as nge
    import npugraph_ex.npu_fx_compiler as compiler

    mode = FakeTensorMode()
    with mode, torch.no_grad():
        half = {"dtype": torch.float16, "device": "npu:0"}
        args = [
            torch.empty(8, 128, **half),
            torch.empty(8, 128, **half),
            torch.empty(128, **half),
            torch.empty(128, **half),
        ]
        graph = make_fx(function)(*args)
    config = nge.CompilerConfig()
    config.force_eager = True
    if ours is not None:
        into_compiler(config, ours)
    left = []
    plain = compiler._NpuFxCompiler._gen_compiled_gm

    def look(self: object, *inputs: object) -> object:
        left.append(plain(self, *inputs))
        return left[-1]

    monkeypatch.setattr(compiler._NpuFxCompiler, "_gen_compiled_gm", look)
    with torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(mode)):
        nge.get_npu_backend(compiler_config=config)(graph, args)
    return npu_layers.operators(left[-1].fx_graph.graph)


@pytest.mark.parametrize(
    "function, fused", [(cast, "npu.npu_add_rms_norm_cast.default"), (quant, "npu.npu_add_rms_norm_quant.default")]
)
def test_the_fused_norm_comes_back_without_the_pass_and_not_with_it(
    function: object, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = executed(function, monkeypatch, None)
    assert without[fused] == 1, without
    options = Options(target="ascend-a2")
    found = executed(function, monkeypatch, AscendPass(options))
    print("without", dict(without), "with", dict(found))
    assert not [name for name in found if name.startswith("npu.npu_add_rms_norm")]
    assert found["bi_compile.add_rms_norm.default"] == 1


def test_what_comes_in_behind_our_pass_stops_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit is of the graph that is executed, whatever npugraph_ex does last."""
    import npugraph_ex._acl_concrete_graph.graph_pass as last

    plain = last.eliminate_self_copy

    def puts_one_back(gm: torch.fx.GraphModule) -> None:
        plain(gm)
        for node in gm.graph.nodes:
            if str(node.target) == "bi_compile.add_rms_norm.default":
                node.target = torch.ops.npu.npu_add_rms_norm.default

    monkeypatch.setattr(last, "eliminate_self_copy", puts_one_back)
    with pytest.raises(AuditError, match="npu_add_rms_norm"):
        executed(cast, monkeypatch, AscendPass(Options(target="ascend-a2")))
