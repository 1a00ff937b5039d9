"""transformers' generate() with a compiled model: a sequence of a left-padded batch has the scores that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import same_bits
from torch import Tensor

import bi_compile

LENGTHS = (9, 4, 7, 2, 8, 5)


def llama(dtype: torch.dtype) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=128
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def scores(model: Any, ids: Tensor, mask: Tensor, cache: str) -> Tensor:
    """[sequences, 12, vocabulary]"""
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None,
        cache_implementation=cache, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(result.scores, 1)


# Dynamo makes a graph for the prompt, for the first token and for the others, each for six sequences and for one
@torch._dynamo.config.patch(recompile_limit=32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in LENGTHS])
    ids = torch.randint(3, 128, (6, 9), generator=generator) * mask
    model = llama(dtype)
    model.forward = bi_compile.compile(model.forward, options={"inner": "eager"})
    together = scores(model, ids, mask, cache)
    assert [same_bits(scores(model, ids[[i]], mask[[i]], cache)[0], together[i]) for i in range(6)] == [True] * 6
