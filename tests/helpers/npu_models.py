"""Small models with random weights in the shapes that Ascend's users serve, for the emulated NPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from npu_layers import CONFIGS

#: latent attention and experts as in DeepSeek: layer 0 dense, layer 1 with experts, one of them shared
LATENT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 512, "max_position_embeddings": 512, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4, "mscale": 0.7, "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
    },
}  # fmt: skip
#: V3: queries of low rank, sigmoid gates with a bias, 2 of 4 groups. V2-Lite: softmax gates without groups
V3 = transformers.DeepseekV3Config(
    **LATENT, architectures=["DeepseekV3ForCausalLM"], q_lora_rank=32, n_routed_experts=16, n_group=4, topk_group=2,
    norm_topk_prob=True, routed_scaling_factor=2.5, topk_method="noaux_tc", scoring_func="sigmoid",
)  # fmt: skip
V2_LITE = transformers.DeepseekV2Config(
    **LATENT, architectures=["DeepseekV2ForCausalLM"], q_lora_rank=None, n_routed_experts=8, n_group=1, topk_group=1,
    topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0,
)  # fmt: skip
#: what stays in float16 in a W8A8 model: vllm-ascend takes no quantised kv_b_proj, and gates are not quantised
FLOAT = ("kv_b_proj", "mlp.gate.", "norm", "embed_tokens", "lm_head")


def make(kind: str, folder: Path, layers: int = 2) -> Path:
    """The model "dense", "moe" (Qwen3), "v3", "v2-lite", or "w8a8" (V2-Lite, quantised) in the folder.

    float16; "v3" in bfloat16, for vLLM scales its residuals in float16 and vllm-ascend's experts do not.
    """
    config = {"v3": V3, "v2-lite": V2_LITE, "w8a8": V2_LITE}.get(kind) or CONFIGS[kind]
    given = {name: value for name, value in config.to_dict().items() if name != "layer_types"}  # one for each layer
    config = type(config)(**{**given, "initializer_range": 0.1, "num_hidden_layers": layers})
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "v3" else torch.float16
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.normal_(0, 0.1)
    model.save_pretrained(folder)
    if kind == "w8a8":
        quantise(folder)
    return folder


def quantise(folder: Path) -> None:
    """int8 weights with a scale for each row, and their description, in the layout of Huawei's ModelSlim, which vllm-ascend reads."""
    from safetensors.torch import load_file, save_file

    path, description, tensors = folder / "model.safetensors", {}, {}
    for name, weight in load_file(path).items():
        description[name] = "FLOAT" if weight.dim() != 2 or any(part in name for part in FLOAT) else "W8A8_DYNAMIC"
        tensors[name] = weight
        if description[name] != "FLOAT":
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().to(torch.int8)
            tensors[f"{name}_scale"], tensors[f"{name}_offset"] = scale, torch.zeros_like(scale)
            description |= {f"{name}_scale": "W8A8_DYNAMIC", f"{name}_offset": "W8A8_DYNAMIC"}
    save_file(tensors, path, {"format": "pt"})
    (folder / "quant_model_description.json").write_text(
        json.dumps({"model_quant_type": "W8A8_DYNAMIC", **description})
    )
