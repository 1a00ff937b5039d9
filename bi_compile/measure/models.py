"""Small models with seeded random weights, of the shapes that people serve. Made in seconds; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    vocab_size=4096,
    max_position_embeddings=2048,
)
#: name -> (configuration class of transformers, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=4, head_dim=64, tie_word_embeddings=False)),
    "llama": ("LlamaConfig", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    # soft-capped logits, tanh gelu, (1 + weight) in the norms
    "gemma2": ("Gemma2Config", dict(num_key_value_heads=4, head_dim=64, query_pre_attn_scalar=64, sliding_window=512)),
    # LayerNorm, biases, learned positions
    "opt": ("OPTConfig", dict(ffn_dim=1536, word_embed_proj_dim=512, do_layer_norm_before=True)),
}


def make(family: str, folder: Path, seed: int = 0, std: float = 0.05, **changes: object) -> Path:
    """Write a model of `family` into `folder` (unless it is there) and return the folder.

    Weights are normal with standard deviation `std`, float32.
    """
    if (folder / "config.json").exists():
        return folder
    import transformers

    name, differs = FAMILIES[family]
    sizes = {k: v for k, v in SIZES.items() if not (family == "opt" and k == "intermediate_size")}
    spread = {"init_std": std} if family == "opt" else {"initializer_range": std}
    config = getattr(transformers, name)(**{**sizes, **differs, **spread, **changes})
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
