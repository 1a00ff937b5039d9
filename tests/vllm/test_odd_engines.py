"""Models that vLLM computes in operators of its own (`odd_engines.py`): equal bits, or refused by name before any request."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import vllm._custom_ops  # noqa: F401  registers vLLM's operators
from engines import python

PROGRAM = Path(__file__).with_name("odd_engines.py")
pytestmark = pytest.mark.xdist_group("engine")

#: model -> the operator that its refusal names, which one of several follows the processor; None: it is served everywhere
OPERATORS: dict[str, str | None] = {
    "mamba2": r"vllm\.mamba_mixer2",
    "falcon-h1": r"vllm\.mamba_mixer2",
    "qwen3-next": r"vllm\.cpu_gdn_attention_core",
    "experts": None,
    "mla": r"vllm\.unified_mla_\w+",
    "bloom": None,
    "lfm2": r"vllm\.short_conv",
    "int8": None,
    "fp8": r"a scaled product with float8 operands has no invariant form: serve",
    "gptq": r"_C\.(int4_scaled_mm_cpu|cpu_gemm_wna16)",
    "awq": r"_C\.(int4_scaled_mm_cpu|cpu_gemm_wna16)",
}


def test_equal_or_refused_by_name() -> None:
    """With enforce_eager, and two compiled ones, all in one process; `odd_engines.py` runs every model both ways."""
    cases = [*(f"{name} eager" for name in OPERATORS), "int8 compiled", "mamba2 compiled"]
    done = python([str(PROGRAM), *cases])
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = {case: outcome for line in lines for case, outcome in json.loads(line).items()}
    assert list(found) == cases and not done.returncode, done.stdout[-3000:]
    for case, outcome in found.items():
        if outcome == {"differ": 0}:
            continue
        operator = OPERATORS[case.split()[0]]
        assert operator is not None, outcome
        assert outcome["answered"] == 0, case
        if "fp8" in case:
            assert operator in outcome["refused"], outcome
            continue
        if case.split()[0] in ("gptq", "awq") and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            assert "cpu_gemm_wna16" in outcome["refused"], outcome  # vLLM's own: it has none without AVX-512
            continue
        assert "is not known to be batch-invariant" in outcome["refused"], outcome
        assert re.search(rf'{operator}\.default\)? unproven: .* trust={{"\w+::\w+"', outcome["refused"]), outcome
