"""Each engine and each compiled model of the demonstration, the benchmark and the tests runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

#: one vLLM process, quiet, offline, with room for a small model's keys and values
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class ProcessFailed(RuntimeError):
    """A process that printed no RESULT line; the message is the end of what it printed."""


def python(arguments: list[str], timeout: float = 1200, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter; stdout and stderr come back as one text."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_module(
    module: str, plan: dict[str, Any], timeout: float = 1200, **environment: str
) -> tuple[dict[str, Any], str]:
    """Run `python -m module plan`; its RESULT line, read, and all that it printed.

    Raises:
        ProcessFailed: it printed none, or took longer than `timeout` seconds.
    """
    try:
        done = python(["-m", module, json.dumps(plan)], timeout, **environment)
        output, status = done.stdout, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        partly = error.stdout or b""
        output = partly.decode(errors="replace") if isinstance(partly, bytes) else partly
        status = f"no result after {timeout:.0f} s"
    line = next((text for text in reversed(output.splitlines()) if text.startswith("RESULT ")), None)
    if line is None:
        tail = "\n".join(output.splitlines()[-40:])
        raise ProcessFailed(f"{sys.executable} -m {module} '{json.dumps(plan)}'\n{status}\n{tail}")
    return json.loads(line.removeprefix("RESULT ")), output
