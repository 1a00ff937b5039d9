"""Verifying and bisecting real vLLM engines on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bi_compile.errors import MeasureError
from bi_compile.measure import engine, engine_bisect
from bi_compile.passes import PASSES

Model = Callable[[str], Path]
PASS: dict[str, Any] = {"compilation_config": {"custom_passes": ["bi_ascend"]}}
#: everything but the products
BUT_PRODUCTS: dict[str, Any] = {
    "compilation_config": {
        "custom_passes": ["rms_norm", "add_rms_norm", "softmax", "reductions", "attention", "pointwise"]
    },
    "additional_config": {"bi_compile": {"on_unproven": "warn"}},
}


def test_an_engine_with_the_pass(model: Model) -> None:
    """The operators are replaced in eager mode here; test_engine.py has the compiled engine."""
    result = engine.verify(model("qwen3"), dtype="bfloat16", sizes=[2, 5, 16], enforce_eager=True, **PASS)
    assert result["mismatch"] is None and result["left"] == 0, result
    assert result["rows"] == 3 * 3 * 16 and set(result["batches"]) == {"given", "reversed", "shuffled"}


def test_an_engine_without_it_and_its_counterexample(model: Model) -> None:
    """The smallest batch is found, and the same plan with `only` shows the same."""
    settings = {"dtype": "float32", "enforce_eager": True, "requests": 8, "sizes": [8]}
    found = engine.verify(model("qwen3"), **settings)["mismatch"]
    assert found is not None and found["request"] in found["batch"] and len(found["batch"]) <= 8
    only = {"request": found["request"], "batch": found["batch"]}
    assert engine.verify(model("qwen3"), **settings, only=only)["mismatch"] == found


PRODUCTS = {entry.operator for p in PASSES if p.name == "matmul" for entry in p.entries}


@pytest.mark.parametrize(
    ("settings", "operators"),
    [({}, {"_C.onednn_mm.default"}), (BUT_PRODUCTS, PRODUCTS)],
    ids=["without the pass", "without the products' pass"],
)
def test_the_first_product_is_named(model: Model, settings: dict[str, Any], operators: set[str]) -> None:
    """vLLM's packed product without the pass; with all passes but one, an operator of that one."""
    mismatch, found = engine_bisect.bisect(model("qwen3"), dtype="float32", **settings)
    assert mismatch is not None and found.first is not None
    assert found.first.operator in operators and found.first.layer, found.line()
    assert ", line " in found.first.where and "model step" in found.where
    assert not found.unplaced and not found.unpaired
    assert any("Sampler" in s.layer for s in found.steps), "the comparison reaches the sampler"


@pytest.mark.parametrize("measure", [engine.verify, engine_bisect.bisect])
def test_what_is_refused_before_an_engine_starts(model: Model, tmp_path: Path, measure: Callable[..., Any]) -> None:
    with pytest.raises(MeasureError, match="prefix caching is on"):
        measure(model("qwen3"), enable_prefix_caching=True)
    with pytest.raises(MeasureError, match=r"config\.json is missing"):
        measure(tmp_path)
