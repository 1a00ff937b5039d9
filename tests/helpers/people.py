"""Programs that people compile, each with a verdict: how many of six rows differ in a batch from what they are alone.

    python tests/helpers/people.py [name ...]           the table of docs/use/torch-compile.md, with Inductor beside it
    python tests/helpers/people.py --ours [name ...]    bi_ascend alone

Each is compiled for six rows, called again with three and with one, so that graphs of static and of symbolic sizes are compared.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 6
#: a function of rows, its inputs with ROWS rows each
Program = tuple[Callable[..., Tensor], list[Tensor]]


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def tokens(length: int, vocabulary: int) -> Tensor:
    return torch.randint(3, vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(1))


# -- written out --------------------------------------------------------------------------------------------------------


class ResNetBlock(nn.Module):
    """7x7 stem with a maximum pool, a block with a shortcut of stride 2, a mean and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.a, self.norm_a = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.b, self.norm_b = nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        self.short, self.head = nn.Conv2d(16, 32, 1, 2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))) + self.short(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNetBlock(nn.Module):
    """A diffusion UNet in small: residual blocks with the time's embedding, attention in the middle, down, up and a skip."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.into, self.norm = nn.Conv2d(4, width, 3, padding=1), nn.GroupNorm(4, width)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.down, self.up = nn.Conv2d(width, width, 3, 2, 1), nn.Conv2d(width, width, 3, padding=1)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.last = nn.Conv2d(2 * width, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(8) / 2)
        angles = t[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.into(x)
        skip = x + self.a(F.silu(self.norm(x)) + time[:, :, None, None])
        y = self.down(skip)
        q, k, v = self.qkv(y.flatten(2).transpose(1, 2)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = y + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).transpose(1, 2).view_as(y)
        y = self.up(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        return self.last(F.silu(torch.cat([y, skip], 1)))


class DiTBlock(nn.Module):
    """Patches, adaptive layer norms, attention and an MLP."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches, self.label = nn.Conv2d(4, width, 2, 2), nn.Embedding(10, width)
        self.modulate, self.norm = nn.Linear(width, 6 * width), nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        a, b, c, d, e, f = self.modulate(F.silu(self.label(label)))[:, None].chunk(6, 2)
        y = self.norm(x) * (1 + b) + a
        x = x + c * self.attention(y, y, y, need_weights=False)[0]
        return x + f * self.mlp(self.norm(x) * (1 + e) + d)


class Breaks(nn.Module):
    """Three graphs, and a function that is not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(96, 64), nn.Linear(64, 64), nn.Linear(64, 40)

    @torch._dynamo.disable
    def uncompiled(self, x: Tensor) -> Tensor:
        return self.b(x).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        torch._dynamo.graph_break()
        return F.layer_norm(self.c(self.uncompiled(x)), [40])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(48, 32, 2, batch_first=True, bidirectional=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def encoder() -> Program:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(9) >= torch.tensor([9, 4, 7, 2, 8, 5])[:, None]
    return lambda x, padding: model(x, src_key_padding_mask=padding).mean(1), [rand(ROWS, 9, 64), padding]


def plain(model: Callable[[], nn.Module], *inputs: Tensor) -> Callable[[], Program]:
    return lambda: (model().eval(), list(inputs))


# -- of transformers ----------------------------------------------------------------------------------------------------


def causal(name: str, **changes: Any) -> Any:
    """A small decoder of transformers."""
    import transformers

    sizes: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128
    )  # fmt: skip
    config = getattr(transformers, name)(**(sizes | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(name: str, **changes: Any) -> Callable[[], Program]:
    def make() -> Program:
        model = causal(name, **changes)
        return lambda ids: model(input_ids=ids, use_cache=False).logits[:, -1], [tokens(11, 128)]

    return make


def sentences() -> Program:
    from bi_compile.demo.compiled import encoder

    return encoder(ROWS)


def whisper() -> Program:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=20, max_source_positions=30
    )  # fmt: skip
    model = WhisperEncoder(config).eval()
    return lambda x: model(x).last_hidden_state, [rand(ROWS, 20, 60)]


def generated(
    cache: str = "dynamic", dtype: torch.dtype = torch.float32, beams: int = 1, window: int | None = None
) -> Callable[[], Program]:
    """The scores of 12 tokens after left-padded prompts; only the model is compiled, as in `Generated`."""

    def make() -> Program:
        changes = {"sliding_window": window} if window else {}
        model = causal("MistralConfig" if window else "LlamaConfig", num_hidden_layers=1, **changes).to(dtype)
        mask = torch.tensor([[0] * (9 - n) + [1] * n for n in (9, 4, 7, 2, 8, 5)])
        return Generated(model, cache, beams), [tokens(9, 128) * mask, mask]

    return make


class Generated:
    """`model.generate()`, whose `forward` is compiled."""

    def __init__(self, model: Any, cache: str, beams: int) -> None:
        self.model, self.cache, self.beams = model, cache, beams
        self.plain = model.forward

    def compiled(self, **how: Any) -> Generated:
        self.model.forward = torch.compile(self.plain, **how)
        return self

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, num_beams=self.beams,
            cache_implementation=self.cache, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(found.scores, 1).unflatten(0, (len(ids), self.beams)).float()


PROGRAMS: dict[str, Callable[[], Program]] = {
    "generate(), growing cache, float32": generated("dynamic"),
    "generate(), growing cache, bfloat16": generated("dynamic", torch.bfloat16),
    "generate(), static cache, float32": generated("static"),
    "generate(), static cache, bfloat16": generated("static", torch.bfloat16),
    "generate(), a sliding window of 4": generated("dynamic", window=4),
    "generate(), two beams": generated("dynamic", beams=2),
    "several graphs and graph breaks": plain(Breaks, rand(ROWS, 96)),
    "nn.TransformerEncoder with padding": encoder,
    "sentence encoder all-MiniLM-L6-v2": sentences,
    "a DiT block": plain(DiTBlock, rand(ROWS, 4, 8, 8), torch.arange(ROWS)),
    "a diffusion UNet in small": plain(UNetBlock, rand(ROWS, 4, 8, 8), torch.arange(ROWS) * 100.0),
    "nn.LSTM, two layers, both directions": plain(Recurrent, rand(ROWS, 7, 48)),
    "a ResNet block with stem and head": plain(ResNetBlock, rand(ROWS, 3, 32, 32)),
    "Whisper's encoder": whisper,
    "Mamba": logits("MambaConfig", state_size=8, num_hidden_layers=1),
    "Qwen3-MoE": logits("Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
}


def differ(make: Callable[[], Program], **how: Any) -> str:
    """How many of the rows differ, or "refused: " with the reason. how: as torch.compile takes it."""
    from support import same_bits

    torch._dynamo.reset()
    torch.manual_seed(0)
    program, inputs = make()
    run = program.compiled(**how) if isinstance(program, Generated) else torch.compile(program, **how)

    def rows(which: Sequence[int]) -> Tensor:
        return run(*(x[list(which)] for x in inputs)).clone()

    try:
        with torch.no_grad(), warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64):
            warnings.simplefilter("ignore")
            together, three = rows(range(ROWS)), rows([4, 0, 3])
            alone = [rows([i])[0] for i in range(ROWS)]
    except Exception as error:
        return f"refused: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
    others = dict(zip([4, 0, 3], three, strict=True))
    found = [same_bits(alone[i], together[i]) and same_bits(alone[i], others.get(i, alone[i])) for i in range(ROWS)]
    return f"{found.count(False)} of {ROWS}"


def main(names: Sequence[str], ours_alone: bool) -> None:
    backends = ("bi_ascend",) if ours_alone else ("inductor", "bi_ascend")
    for name in names or PROGRAMS:
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            found = [differ(PROGRAMS[name], backend=backend) for backend in backends]
        print(f"| {name} | {' | '.join(found)} |", flush=True)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments = sys.argv[1:]
    main([a for a in arguments if a != "--ours"], "--ours" in arguments)
