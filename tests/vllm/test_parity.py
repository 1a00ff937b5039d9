"""What vLLM serves with the pass and what transformers computes of the same tokens with it are the same bits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bi_compile.measure.process import run_module

pytestmark = pytest.mark.xdist_group("engine")


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "bfloat16")])
def test_rollout_and_trainer_have_the_same_logprobs(model: Callable[[str], Path], family: str, dtype: str) -> None:
    """Prompts of up to 300 tokens, read in chunks beside others and then continued; the trainer reads each alone."""
    result, _ = run_module("bi_compile.measure.parity", {"model": str(model(family)), "dtype": dtype, "requests": 3})
    assert result["logprobs"] > 300 and set(result["equal"].values()) == {result["logprobs"]}, result
