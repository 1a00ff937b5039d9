"""`tp_invariant`: the same bits on one rank and on several. Every model, on up to four ranks: `ranks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from mixtures import differing
from torch import nn

from bi_compile import HostError

pytestmark = pytest.mark.xdist_group("second engine")


def test_one_rank_and_two_have_the_same_bits(tmp_path: Path) -> None:
    """GLM-4's mixture, which is DeepSeek-V3's with ordinary attention: layers whose sums are divided, experts (sigmoid, groups, a correcting
    bias), shared experts, and an embedding with zeros of both signs."""
    plan = {"requests": 6, "batches": [6], "tokens": 4, "max_model_len": 128}
    found = {}
    for count in (1, 2):
        result, said = ranks.run("glm4-moe", "bfloat16", "compiled", count, tmp_path, **plan)
        assert differing(result) == {"6": 0}, result
        replaced = said.partition("replaced ")[2]
        assert "_C.cpu_fused_moe.default" in replaced and "_C.shm_allreduce" not in replaced, said
        found[count] = result["bits"]
    assert found[1] == found[2]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's groups, of one rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        parallel_state.initialize_model_parallel(1)
        yield
        parallel_state.cleanup_dist_env_and_memory()


def row_parallel(size: int, **more: Any) -> nn.Module:
    from vllm.model_executor.layers.linear import RowParallelLinear

    layer = RowParallelLinear(size, 24, params_dtype=torch.bfloat16, return_bias=False, **more)
    for x in layer.parameters():
        x.data.normal_()
    return nn.ModuleDict({"down_proj": layer})


def test_a_layer_rounds_once_behind_its_bias(one_rank: None) -> None:
    from bi_compile.vllm.ranks import put_in

    model = row_parallel(64, bias=True)
    layer, x = model["down_proj"], torch.randn(5, 64).bfloat16()
    put_in(model, 4)
    parts = [x[:, i : i + 16].float() @ layer.weight[:, i : i + 16].float().t() for i in range(0, 64, 16)]
    want = (parts[0] + parts[1]) + (parts[2] + parts[3]) + layer.bias
    torch.testing.assert_close(layer(x).float(), want.detach(), rtol=2**-8, atol=1e-6)
    assert torch.equal(layer(x)[2:], layer(x[2:])) and layer(x[None]).shape == (1, 5, 24)


def test_a_layer_that_cannot_have_one_order_is_named(one_rank: None) -> None:
    from bi_compile.vllm.ranks import put_in

    with pytest.raises(
        HostError, match=r"down_proj adds up 36 products, which do not divide into tp_invariant=8 segments"
    ):
        put_in(row_parallel(36), 8)
    with pytest.raises(HostError, match=r"down_proj leaves its sum over ranks to the model"):
        put_in(row_parallel(64, bias=False, reduce_results=False), 4)
    quantised = row_parallel(64)
    quantised["down_proj"].quant_method = object()
    with pytest.raises(
        HostError, match=r"down_proj: tp_invariant takes linear layers that are not quantised, this one has object"
    ):
        put_in(quantised, 4)
    alone = row_parallel(36, disable_tp=True)
    put_in(alone, 8)  # no rank has a part of it
