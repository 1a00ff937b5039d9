"""attn_implementation="bi_compile": a sequence has the bits that it has alone, padded or packed; gradients; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import same_bits
from torch import Tensor

import bi_compile
from bi_compile.measure.parity import LAYOUTS
from bi_compile.transformers import attention

SEQUENCES = [[5, 9, 3, 7, 1, 2, 8, 4, 6, 3, 2], [4, 4, 9], [1, 2, 3, 4, 5, 6, 7]]


@pytest.fixture
def gemma2() -> Any:
    """One layer with a window shorter than the sequences and one without, soft-capped."""
    import transformers

    bi_compile.transformers.register()
    config = transformers.Gemma2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=128, sliding_window=4, initializer_range=0.3, attn_logit_softcapping=5.0, attn_implementation="bi_compile",
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def logits(run: Any, layout: str) -> list[Tensor]:
    """For each sequence [L, vocabulary]."""
    found = []
    for batch in LAYOUTS[layout](SEQUENCES):
        out = run(**batch.inputs, use_cache=False).logits
        sequences = SEQUENCES if len(batch.places) > 1 else [SEQUENCES[len(found)]]
        found += [out[row, at : at + len(s)] for (row, at), s in zip(batch.places, sequences, strict=True)]
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_has_the_bits_that_it_has_alone(gemma2: Any, dtype: torch.dtype, compiled: bool) -> None:
    model = gemma2.to(dtype)
    run = bi_compile.compile(model, options={"inner": "eager"}) if compiled else model
    with bi_compile.invariant(), torch.no_grad():
        alone = logits(model, "alone")
        for layout in ("padded right", "padded left", "packed"):
            assert same_bits(logits(run, layout), alone), layout


def test_it_computes_what_transformers_does_and_so_do_its_gradients(gemma2: Any) -> None:
    """The soft-cap, the window and the groups of heads are transformers' own, in plain code."""
    model = gemma2.float()
    found = []
    for kind in ("eager", "bi_compile"):
        model.set_attn_implementation(kind)
        model.zero_grad()
        out = logits(model, "padded left")
        torch.cat(out).square().sum().backward()
        found.append([*out, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_what_is_not_covered_is_said() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    module = torch.nn.Module()
    for words, change in {
        "a cache of keys": {"key": torch.randn(2, 2, 6, 8)},
        "later tokens": {"is_causal": False},
        "dropout=0.1": {"dropout": 0.1},
        "a mask of 4 dimensions": {"attention_mask": torch.ones(2, 1, 5, 5)},
        "position_bias=": {"position_bias": torch.zeros(1)},
        "gradients with sinks": {"s_aux": torch.zeros(4)},
    }.items():
        given: dict[str, Any] = {"query": q, "key": k, "value": k, "attention_mask": None, **change}
        with pytest.raises(NotImplementedError, match=f'attn_implementation="bi_compile" does not cover .*{words}'):
            attention(module, **given)
    holes = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
    with pytest.raises(
        ValueError, match="a row of the mask has padding between tokens: put a sequence's tokens side by side"
    ):
        attention(module, q, k, k, holes)
