"""Verifying and bisecting real vLLM engines on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import shows_the_fault
from typer.testing import CliRunner

from bi_compile.cli import app
from bi_compile.errors import MeasureError
from bi_compile.measure import bisect_vllm as engine_bisect
from bi_compile.measure import verify_vllm
from bi_compile.passes import PASSES

Model = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("engine")
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
    result = verify_vllm.verify(model("qwen3"), dtype="bfloat16", sizes=[2, 5, 16], enforce_eager=True, **PASS)
    assert result["mismatch"] is None and result["left"] == 0, result
    assert result["rows"] == 3 * 3 * 16 and set(result["batches"]) == {"given", "reversed", "shuffled"}


@shows_the_fault
def test_an_engine_without_it_and_its_counterexample(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command finds a small batch, writes it down, and shows the same when it reads that."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--requests", "8", "--engine-args", '{"dtype": "float32", "enforce_eager": true}']
    first = CliRunner().invoke(app, ["verify", "vllm", str(model("qwen3")), *arguments])
    assert first.exit_code == 1 and "not batch-invariant: request" in first.output, first.output
    again = CliRunner().invoke(app, ["verify", "vllm", "counterexample.json"])
    assert again.exit_code == 1 and again.output.strip() in first.output, again.output


def test_what_is_no_counterexample(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    result = CliRunner().invoke(app, ["verify", "vllm", str(tmp_path / "other.json")])
    assert result.exit_code == 2 and "is not a counterexample" in result.output


PRODUCTS = {entry.operator for p in PASSES if p.name == "matmul" for entry in p.entries}


@pytest.mark.parametrize(
    ("settings", "operators"),
    [
        pytest.param({}, {"_C.onednn_mm.default"}, id="without the pass", marks=shows_the_fault),
        pytest.param(BUT_PRODUCTS, PRODUCTS, id="without the products' pass"),
    ],
)
def test_the_first_product_is_named(model: Model, settings: dict[str, Any], operators: set[str]) -> None:
    """vLLM's packed product without the pass; with all passes but one, an operator of that one."""
    mismatch, found = engine_bisect.bisect(model("qwen3"), dtype="float32", **settings)
    assert mismatch is not None and found.first is not None
    assert found.first.operator in operators and found.first.layer, found.line()
    assert ", line " in found.first.where and "model step" in found.where
    assert not found.unplaced and not found.unpaired
    assert any("Sampler" in s.layer for s in found.steps), "the comparison reaches the sampler"


@pytest.mark.parametrize("measure", [verify_vllm.verify, engine_bisect.bisect])
def test_what_is_refused_before_an_engine_starts(model: Model, tmp_path: Path, measure: Callable[..., Any]) -> None:
    with pytest.raises(MeasureError, match="prefix caching is on"):
        measure(model("qwen3"), enable_prefix_caching=True)
    with pytest.raises(MeasureError, match=r"config\.json is missing"):
        measure(tmp_path)
