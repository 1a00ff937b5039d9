"""Engines in processes of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bi_compile.measure import process

#: where vLLM by itself is known to give requests other bits in a batch; without AVX-512 the requests of these tests got the same
shows_the_fault = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="on this processor vLLM alone gives these requests the same bits",
)

PASS: dict[str, Any] = {"compilation_config": {"custom_passes": ["bi_ascend"]}}


def python(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """This interpreter, in the demonstration's environment but with vLLM's log."""
    return process.python(arguments, 540, VLLM_LOGGING_LEVEL="INFO", **environment)


def requests(model: Path, cache: Path, **plan: Any) -> tuple[dict[str, Any], str]:
    """Run `bi_compile.measure.requests`; its result and everything that was printed."""
    caches = {"VLLM_CACHE_ROOT": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    return process.run_module(
        "bi_compile.measure.requests", {"model": str(model), **plan}, 540, VLLM_LOGGING_LEVEL="INFO", **caches
    )
