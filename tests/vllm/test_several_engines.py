"""Several engines in one process (`several_engines.py`): each with the key gives every request the same bits, whoever lives beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import python

from bi_compile.measure.models import make

PROGRAM = Path(__file__).with_name("several_engines.py")
pytestmark = pytest.mark.xdist_group("engine")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    return make("qwen3", tmp_path_factory.mktemp("small"), num_hidden_layers=2, **sizes)


def run(model: Path, *steps: str, **settings: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """(step -> what became of it and how many requests differ by engine, what is left in the process)."""
    plan = {"steps": steps, "settings": {"dtype": "bfloat16", **settings}}
    done = python([str(PROGRAM), str(model), json.dumps(plan)])
    line = next((t for t in done.stdout.splitlines() if t.startswith("RESULT ")), None)
    assert line is not None, done.stdout[-4000:]
    result = json.loads(line.removeprefix("RESULT "))
    return {step: rest for step, *rest in result["steps"]}, result["left"]


def test_started_refused_and_ended_in_any_order(small: Path) -> None:
    """One without the key lives first, and has frozen vLLM's environment; others come, are refused and go."""
    steps = ("plain a", "key b", "no-weights c", "split d", "plain e", "end b", "key f", "end a", "end f", "end e")
    found, left = run(small, *steps, enforce_eager=True)
    assert found["key b"] == found["plain e"] == ["started", {"b": 0}]
    assert "Cannot find any model weights" in found["no-weights c"][0] and found["no-weights c"][1] == {"b": 0}
    assert (
        "HostError: VLLM_CPU_ATTN_SPLIT_KV=1 is set, and an engine with custom_passes lives in" in found["split d"][0]
    )
    assert found["split d"][1] == {"b": 0} and found["key f"] == ["started", {"f": 0}]
    assert left == {"split_kv": True, "linear": "vllm.model_executor.layers.utils", "fallbacks": 0}
