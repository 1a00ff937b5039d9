"""What vLLM serves with the pass and what transformers computes of the same tokens with it are the same bits; and they stay so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bi_compile.errors import MeasureError
from bi_compile.measure import parity
from bi_compile.measure.models import smollm2
from bi_compile.measure.process import python, run_module

pytestmark = pytest.mark.xdist_group("second engine")
EXAMPLE = Path(__file__).parents[2] / "examples" / "rl_on_cpu.py"


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("qwen3", {"attention": ["sdpa"], "layouts": ["alone", "padded right"], "ways": ["compiled", "eager, with gradients"]}),
        ("gemma2", {"attention": ["bi_compile"], "layouts": ["padded left", "packed"], "ways": ["eager", "compiled, with gradients"]}),
        ("qwen3-moe", {"attention": ["bi_compile"], "layouts": ["packed"], "ways": ["eager, with gradients"]}),
    ],
)  # fmt: skip
def test_rollout_and_trainer_have_the_same_logprobs(
    model: Callable[[str], Path], family: str, plan: dict[str, Any]
) -> None:
    """Prompts of up to 300 tokens, read in chunks beside others and then continued. All models and ways: `sweep_parity.py`."""
    plan = {"model": str(model(family)), "dtype": "bfloat16", "requests": 3, **plan}
    result, _ = run_module("bi_compile.measure.parity", plan)
    assert result["logprobs"] > 300 and set(result["equal"].values()) == {result["logprobs"]}, result


@pytest.mark.parametrize(
    ("plan", "config", "words"),
    [
        ({"quantization": "fp8"}, {}, "quantization='fp8': the rollout is quantised and the trainer is not"),
        ({"kv_cache_dtype": "fp8_e4m3"}, {}, "kv_cache_dtype='fp8_e4m3': the rollout"),
        ({}, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config in .*config.json: the rollout"),
        ({"dtype": "auto"}, {}, "dtype='auto': both sides need one"),
    ],
)  # fmt: skip
def test_two_functions_are_not_compared(
    plan: dict[str, Any], config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    with pytest.raises(MeasureError, match=words):
        parity.check({"model": str(tmp_path), "dtype": "bfloat16", **plan})


def test_the_ratio_is_one_after_the_weights_were_changed(tmp_path: Path) -> None:
    """Two steps of the example with two of the model's layers."""
    from transformers import AutoModelForCausalLM

    folder = smollm2(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=2, dtype=torch.bfloat16).save_pretrained(folder)
    done = python([str(EXAMPLE), "--one", "with", "--steps", "2", "--model", str(folder)])
    steps = [json.loads(line.removeprefix("STEP ")) for line in done.stdout.splitlines() if line.startswith("STEP ")]
    assert [(step["ratio"], step["kl"]) for step in steps] == [(0.0, 0.0)] * 2, done.stdout[-3000:]
