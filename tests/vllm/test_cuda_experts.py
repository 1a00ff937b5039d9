"""Mixtures of experts in vLLM on CUDA, as far as they can be tested without one; `experts_on_cuda.py` compares bits on a device."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bi_compile import HostError
from bi_compile.vllm import cuda_experts

W13, W2, TOP_K = (8, 512, 256), (8, 256, 256), 2


def vllms(tokens: int) -> dict[str, int]:
    return {**cuda_experts.REFERENCE, "BLOCK_SIZE_M": 16 if tokens <= 32 else 64 if tokens <= 100 else 128}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(cuda_experts, "_same", known)
    return known


def test_a_tile_that_was_not_compared_or_differs_gives_way(compared: dict[Any, Any]) -> None:
    choose = cuda_experts.pinned(lambda w1, w2, k, dtype, tokens, block_shape=None: vllms(tokens))
    assert choose(W13, W2, TOP_K, None, 64) == cuda_experts.REFERENCE, "nothing was compared"
    tiles = cuda_experts.chosen_tiles(vllms, 200)
    assert list(tiles.values()) == [(1, 32), (33, 100), (101, 200)]
    compared[W13, W2, TOP_K, None] = set(list(tiles)[:2])
    assert choose(W13, W2, TOP_K, None, 64) == vllms(64)
    assert choose(W13, W2, TOP_K, None, 101) == cuda_experts.REFERENCE, "it differs"
    assert choose(W13, W2, 3, None, 64) == cuda_experts.REFERENCE, "another number of experts of a token"
    assert choose(W13, W2, TOP_K, "float32", 64) == cuda_experts.REFERENCE, "another dtype"


class Products:
    """Stands in for the device: a tile of 64 rows has other bits for more than 40 tokens, one of 128 does not fit."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, biases: Any, top_k: int, rows: int, kind: str) -> None:
        self.ids, self.kind = torch.zeros(rows, top_k), kind

    def run(self, tile: Any, rows: int) -> list[torch.Tensor]:
        if tile["BLOCK_SIZE_M"] == 128:
            raise OutOfResources(1, 0, "shared memory")
        out = torch.ones(rows, 4)
        if tile["BLOCK_SIZE_M"] == 64 and rows > 40 and self.kind == "cancelling":
            out[-1, -1] = 1 + 2**-23
        return [torch.ones(rows, 4), out]


def test_only_tiles_with_the_same_bits_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_experts, "_Products", Products)
    tiles = cuda_experts.chosen_tiles(vllms, 200)
    weights = torch.zeros(W13), torch.zeros(W2)
    good = cuda_experts.compare(*weights, [None, None], TOP_K, tiles)
    assert [dict(tile)["BLOCK_SIZE_M"] for tile in good] == [16]
    few = {tile: (low, min(high, 40)) for tile, (low, high) in tiles.items()}
    assert len(cuda_experts.compare(*weights, [None, None], TOP_K, few)) == 2


def config(**given: Any) -> Any:
    model = SimpleNamespace(is_moe=given.pop("is_moe", True), quantization=given.pop("quantization", None))
    kernels = SimpleNamespace(moe_backend=given.pop("moe_backend", "auto"))
    parallel = SimpleNamespace(**{"enable_expert_parallel": False, "data_parallel_size": 1, **given})
    return SimpleNamespace(model_config=model, parallel_config=parallel, kernel_config=kernels)


def test_vllms_triton_kernel_is_asked_for() -> None:
    for given, backend in (({}, "triton"), ({"is_moe": False}, "auto"), ({"quantization": "fp8"}, "auto")):
        asked = config(**given)
        cuda_experts.before_config(asked)
        assert asked.kernel_config.moe_backend == backend


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enable_expert_parallel": True}, "enable_expert_parallel=True: .*remove that line"),
        ({"data_parallel_size": 2}, "data_parallel_size=2: .*engines of their own"),
        ({"moe_backend": "flashinfer_cutlass"}, "moe_backend='flashinfer_cutlass': .*\"triton\"} or remove"),
    ],
)
def test_experts_that_something_else_computes_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(HostError, match=words):
        cuda_experts.before_config(config(**given))


def named(name: str, **attributes: Any) -> Any:
    made = type(name, (), {})()
    made.__dict__.update(attributes)
    return made


@pytest.mark.parametrize(
    ("method", "router", "words"),
    [
        (named("Fp8MoEMethod"), {}, "quantised experts \\(Fp8MoEMethod\\)"),
        (
            named("UnquantizedFusedMoEMethod", moe_kernel=SimpleNamespace(fused_experts=named("FlashInferExperts"))),
            {},
            "computed by FlashInferExperts, .*moe_backend",
        ),
        (named("UnquantizedFusedMoEMethod"), {"top_k": 9}, "9 of 8 experts: correct the model's config.json"),
    ],
)
def test_what_is_not_known_is_refused_with_its_place(method: Any, router: dict[str, int], words: str) -> None:
    layer = SimpleNamespace(
        router=SimpleNamespace(**{"global_num_experts": 8, "top_k": 2, **router}), quant_method=method
    )
    layers = {"model.layers.0.attn": object(), "model.layers.0.mlp.experts": layer}
    with pytest.raises(HostError, match=rf"^model\.layers\.0\.mlp\.experts\b.*{words}"):
        cuda_experts.check_model(SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers)))


def parameters(module: str, function: str) -> list[str]:
    spec = importlib.util.find_spec(f"{cuda_experts.LAYERS}.{module}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    (found,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    return [a.arg for a in (*found.args.args, *found.args.kwonlyargs)]


def test_vllm_has_what_is_called_and_wrapped() -> None:
    """In the installed vLLM; its Triton kernels cannot be imported on a CPU."""
    first = ["w1_shape", "w2_shape", "top_k", "dtype", "M"]
    assert parameters("fused_moe", "try_get_optimal_moe_config")[:5] == first
    tile = ["topk_ids", "config", "num_tokens", "top_k_num", "global_num_experts", "expert_map"]
    assert parameters("fused_moe", "_prepare_expert_assignment")[:6] == tile
    called = parameters("fused_moe", "invoke_fused_moe_triton_kernel")
    assert called[:12] == [
        "A", "B", "C", "A_scale", "B_scale", "topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded", "mul_routed_weight",
        "top_k", "config",
    ]  # fmt: skip
    assert {
        "compute_type",
        "use_fp8_w8a8",
        "use_int8_w8a8",
        "use_int8_w8a16",
        "use_int4_w4a16",
        "per_channel_quant",
        "block_shape",
        "B_bias",
    } <= {*called}
    assert parameters("experts.triton_moe", "moe_sum")[:3] == ["self", "input", "output"]
    assert "hidden_states" in parameters("runner.moe_runner", "_forward_impl")
