"""Ascend's attention operator: as many launches for 256 requests as for one, and AscendC's in its place where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("attention_of_a_step.py")
PACKAGE = Path(__file__).parents[1] / "helpers" / "stand_in"
KERNEL = {"triton._paged_attention": 1}
THEIRS = "batch_invariant_ops::npu_fused_infer_attention_score_batch_invariant"


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_launches_do_not_follow_the_number_of_requests() -> None:
    """The native operator is one launch, and so is ours, but for the lengths' copy in the first layer of a step."""
    found = run()
    assert len(found["launches"]) == 18
    for case, (native, first, others) in found["launches"].items():
        assert sum(native.values()) == 1 and first == KERNEL | {"aten::copy_": 1} and others == KERNEL, case
    assert found["error"] < 0.01 and found["out"]
    assert found["certificate"] == {"batch_invariant_ops": "not installed: Triton kernels serve every operator"}


@pytest.fixture(scope="module")
def with_the_package() -> dict[str, Any]:
    return run(str(PACKAGE))


def test_with_the_package_its_attention_is_called_and_ours_is_not(with_the_package: dict[str, Any]) -> None:
    """A call for the decodes and one for the prefills of a batch that has both."""
    for case, (_, first, others) in with_the_package["launches"].items():
        both = case.startswith("decode, then prefill") and not case.endswith(" 1")
        assert first == others == ({THEIRS: 2, "aten::cat": 1} if both else {THEIRS: 1}), case
    assert with_the_package["error"] == 0 and with_the_package["out"]


def test_with_the_package_products_and_sums_are_its_and_the_certificate_says_so(
    with_the_package: dict[str, Any],
) -> None:
    calls = with_the_package["calls"]
    assert with_the_package["reductions"] == [True] * 7
    assert [calls[f"npu_{name}_batch_invariant"] for name in ("reduce_sum", "reduce_mean", "log_softmax")] == [2, 1, 1]
    assert calls["npu_mm_batch_invariant"] == 1
    assert calls["npu_matmul_batch_invariant"] == 2 and with_the_package["transposed"]
    assert calls["npu_fused_infer_attention_score_batch_invariant.out"] == 1
    assert with_the_package["certificate"] == {
        "batch_invariant_ops": "of unknown version: serves mm, bmm, bmm_transposed, sum, mean, log_softmax, npu_fused_infer_attention_score_batch_invariant"
    }
