"""Small models, with seeded random weights, whose layers vLLM computes in operators of its own: state spaces, experts, latent
attention, ALiBi, short convolutions, quantised linear layers in the layouts that vLLM reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bi_compile.measure.models import make, write

SIZES: dict[str, Any] = dict(
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=4096,
    max_position_embeddings=2048,
    initializer_range=0.05,
    intermediate_size=512,
    tie_word_embeddings=False,
)
#: name -> (configuration class of transformers, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("Mamba2Config", dict(state_size=64, num_heads=8, n_groups=1, expand=2, chunk_size=64)),
    "falcon-h1": (
        "FalconH1Config",
        dict(mamba_d_ssm=512, mamba_n_heads=8, mamba_d_head=64, mamba_d_state=64, mamba_n_groups=1, mamba_chunk_size=64),
    ),
    # gated delta rule in three layers of four; vLLM wants a layer of experts
    "qwen3-next": (
        "Qwen3NextConfig",
        dict(
            num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 1, 2], decoder_sparse_step=1,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
            moe_intermediate_size=64, shared_expert_intermediate_size=64,
        ),
    ),
    "experts": (
        "Qwen3MoeConfig",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, decoder_sparse_step=1, mlp_only_layers=[]),
    ),
    "mla": (
        "DeepseekV2Config",
        dict(
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, moe_intermediate_size=64,
            first_k_dense_replace=2, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64,
            v_head_dim=64, num_key_value_heads=4,
        ),
    ),
    # ALiBi: vLLM hands attention a slope for each head
    "bloom": ("BloomConfig", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "lfm2": ("Lfm2Config", dict(layer_types=["conv", "full_attention"], block_multiple_of=64)),
}  # fmt: skip
#: what vLLM reads of a configuration and transformers no longer writes
READ_BY_VLLM: dict[str, dict[str, Any]] = {"lfm2": {"conv_dim": 256, "conv_dim_out": 256, "block_dim": 256}}
GROUP = 64


def _eight_bits(kind: str) -> dict[str, Any]:
    """W8A8 in the layout of compressed-tensors: a scale for each output channel, one for each token."""
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


QUANTISED: dict[str, dict[str, Any]] = {
    "int8": _eight_bits("int"),
    "fp8": _eight_bits("float"),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}  # fmt: skip
NAMES = (*FAMILIES, *QUANTISED)


def odd_model(name: str, folder: Path) -> Path:
    """Write the model `name` of `NAMES` into `folder` and return the folder."""
    if name in QUANTISED:
        return _quantised(name, make("qwen3", folder, **SIZES))
    kind, differs = FAMILIES[name]
    write(kind, {**SIZES, **differs}, folder, draw=_matrices)
    _add(folder, READ_BY_VLLM.get(name, {}))
    return folder


def _matrices(model: torch.nn.Module) -> None:
    for weight in model.parameters():
        if weight.dim() > 1:  # those of experts too, which transformers leaves as the memory was
            weight.normal_(std=0.05)


def _add(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _quantised(name: str, folder: Path) -> Path:
    """Its linear layers in `name`'s layout; the 4-bit ones with weights of their own, drawn at random."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights: dict[str, Tensor] = {}
    for key, weight in load_file(path).items():
        layer, _, last = key.rpartition(".")
        if last == "weight" and ("_proj" in layer):
            weights |= {f"{layer}.{part}": value for part, value in _packed(name, weight).items()}
        else:
            weights[key] = weight
    save_file(weights, path, {"format": "pt"})
    _add(folder, {"quantization_config": QUANTISED[name]})
    return folder


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    n, k = weight.shape
    if name == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}
    if name == "fp8":
        scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    scales = torch.rand(k // GROUP, n) * 0.01 + 0.005
    if name == "awq":
        return {"qweight": _any_bits(k, n // 8), "qzeros": _any_bits(k // GROUP, n // 8), "scales": scales.half()}
    zeros = torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32)  # each 8, less the one that GPTQ takes off
    return {
        "qweight": _any_bits(k // 8, n),
        "qzeros": zeros,
        "scales": scales.half(),
        "g_idx": torch.arange(k, dtype=torch.int32) // GROUP,
    }


def _any_bits(*shape: int) -> Tensor:
    """Eight 4-bit numbers in each."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)
