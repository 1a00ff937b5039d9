"""Engines in processes of their own, with small models that are made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PASS: dict[str, Any] = {"compilation_config": {"custom_passes": ["bi_ascend"]}}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **more}


def python(code_or_module: list[str], timeout: int = 540, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on `code_or_module`; output is kept."""
    return subprocess.run([sys.executable, *code_or_module], capture_output=True, text=True, timeout=timeout, env=environment(**env), check=False)


def requests(model: Path, cache: Path, **plan: Any) -> tuple[dict[str, Any], str]:
    """Run `bi_compile.demo.requests`; its result and everything that was printed."""
    run = python(["-m", "bi_compile.demo.requests", json.dumps({"model": str(model), **plan})], VLLM_CACHE_ROOT=str(cache), TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"))
    said = run.stdout + run.stderr
    line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, said[-4000:]
    return json.loads(line.removeprefix("RESULT ")), said
