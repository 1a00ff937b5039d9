"""Engines in processes of their own."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
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


@functools.cache
def _known_of_the_processor() -> Path:
    """A cache of Inductor's with the small programs alone by which it finds out what the processor can: it compiles them for 5 to 15 s."""
    folder = tempfile.mkdtemp(prefix="bi_compile_processor_")
    program = "from torch._inductor import cpu_vec_isa; cpu_vec_isa.valid_vec_isa_list()"
    process.python(["-c", program], TORCHINDUCTOR_CACHE_DIR=folder).check_returncode()
    return Path(folder)


def cold_caches(folder: Path) -> dict[str, str]:
    """The environment of an engine that finds no graph compiled. What Inductor knows of the processor, and vLLM of the classes of models, which
    takes it ten seconds to find out, is shared."""
    if not (folder / "inductor").exists():
        shutil.copytree(_known_of_the_processor(), folder / "inductor")
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
