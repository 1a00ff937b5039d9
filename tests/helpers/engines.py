"""Engines in processes of their own."""

from __future__ import annotations

import os
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


def cold_caches(folder: Path) -> dict[str, str]:
    """The environment of an engine that finds nothing compiled. What vLLM knows of the classes of models, which takes it ten seconds to find
    out, is shared."""
    known = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm" / "modelinfos"
    here = folder / "vllm" / known.name
    known.mkdir(parents=True, exist_ok=True)
    here.parent.mkdir(parents=True, exist_ok=True)
    if not here.exists():
        here.symlink_to(known)
    return {"VLLM_CACHE_ROOT": str(here.parent), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def requests(model: Path, cache: Path, **plan: Any) -> tuple[dict[str, Any], str]:
    """Run `bi_compile.measure.requests`; its result and everything that was printed."""
    return process.run_module(
        "bi_compile.measure.requests",
        {"model": str(model), **plan},
        540,
        VLLM_LOGGING_LEVEL="INFO",
        **cold_caches(cache),
    )
