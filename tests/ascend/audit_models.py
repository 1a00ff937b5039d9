"""The offline audit of models as they are published, every layer at its true width: the table of docs/use/ascend.md.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-ascend/bin/python tests/ascend/audit_models.py     # a minute and a half

The configurations are written out here, from the config.json that belongs to each model; nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import transformers

from bi_compile.offline import trace as offline

QWEN3: dict[str, Any] = {
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
MODELS = {
    "Qwen3-32B": transformers.Qwen3Config(
        **QWEN3, architectures=["Qwen3ForCausalLM"], hidden_size=5120, intermediate_size=25600, num_attention_heads=64,
        num_hidden_layers=64, num_key_value_heads=8,
    ),
    "Qwen3-30B-A3B": transformers.Qwen3MoeConfig(
        **QWEN3, architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4,
    ),
    "DeepSeek-V2-Lite": transformers.DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"], first_k_dense_replace=1, hidden_size=2048, intermediate_size=10944, kv_lora_rank=512,
        max_position_embeddings=163840, moe_intermediate_size=1408, n_group=1, n_routed_experts=64, n_shared_experts=2,
        norm_topk_prob=False, num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16,
        q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=1.0, topk_group=1, topk_method="greedy",
        v_head_dim=128, vocab_size=102400,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        },
    ),
}  # fmt: skip


def audited(name: str, layers: int | None = None) -> offline.Offline:
    """The audit of the model, or of its first layers."""
    config = MODELS[name]
    if layers is not None:
        given = {**config.to_dict(), "num_hidden_layers": layers}
        given.pop("layer_types", None)  # made anew, one for each layer
        config = type(config)(**given)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return offline.run(Path(folder), "ascend-a2", print)


if __name__ == "__main__":
    for name, config in MODELS.items():
        found = audited(name)
        left = ", ".join(f.operator for f in found.left) or "nothing"
        print(
            f"{name}, {config.num_hidden_layers} layers: {found.nodes} nodes, {sum(found.varies.values())} vary, left: {left}"
        )
