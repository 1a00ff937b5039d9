"""Decoder layers as vllm-ascend writes them: what its two compilers execute holds no operator that varies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import npu_layers
import pytest
import torch

VARIANT = {"npu.npu_add_rms_norm.default", "vllm.unquantized_gemm.default"}


@pytest.fixture(scope="module")
def traced(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    config = npu_layers.engine_config(npu_layers.model_folder(kind, tmp_path_factory.mktemp(kind)))
    with npu_layers.one_rank(config):
        yield config, *npu_layers.trace_layer(config, kind), kind


def test_before_the_pass_the_audit_lists_the_variant_operators(traced: tuple[Any, ...]) -> None:
    _, graph, *_ = traced
    print(npu_layers.operators(graph.graph))
    assert set(npu_layers.objections(graph.graph)) == VARIANT


def test_the_batch_is_symbolic(traced: tuple[Any, ...]) -> None:
    _, graph, *_ = traced
    hidden = list(graph.graph.nodes)[1].meta["val"]
    assert hidden.device.type == "npu" and isinstance(hidden.shape[0], torch.SymInt)


@pytest.mark.parametrize("compiler", ["graph_fusion_manager", "npugraph_ex"])
def test_after_it_none_is_left(compiler: str, traced: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config, graph, args, mode, kind = traced
    graph = copy.deepcopy(graph)
    if compiler == "npugraph_ex":
        left = npu_layers.npugraph_ex_mode(config, graph, args, mode, monkeypatch)
    else:
        left = npu_layers.manager_mode(config, graph, args, mode)
    found = npu_layers.operators(left)
    print(compiler, found)
    assert npu_layers.objections(left) == []
    assert not VARIANT & set(found)
    # each norm with residual is one kernel, as the fused operator was; vllm-ascend's split takes two
    assert found["bi_compile.add_rms_norm.default"] == 2 and found["npu.npu_rms_norm.default"] == 2
    assert found["aten.add.Tensor"] == 0
    # the products: qkv, output, and gate_up and down, or the experts' gate
    assert found["bi_compile.mm.default"] == {"dense": 4, "moe": 3}[kind]
