"""What the audit costs an engine's start on a CPU: seconds of the whole start, of the audit of graphs, and of what ran uncompiled.

    python tests/vllm/start_cost.py [eager] [FAMILY]

Two starts of a model of two layers, in one process: with cold caches of compiled graphs, then with warm ones. The import of vLLM is no part of it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bi_compile.measure import process, requests


class Clock:
    """Seconds that `Observer` takes, without the operators and graphs that it calls, and what they call."""

    def __init__(self) -> None:
        from bi_compile import eager_audit

        self.judging = 0.0
        self.within: list[float] = []  # of each call that runs now, the seconds of the calls within it
        eager_audit.Observer.__torch_dispatch__ = self.timed(eager_audit.Observer.__torch_dispatch__, judges=True)  # type: ignore[method-assign]
        eager_audit._inside = self.timed(eager_audit._inside, judges=False)

    def timed(self, function: Callable[..., Any], judges: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.within.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                own = seconds - self.within.pop()
                if judges:
                    self.judging += own
                if self.within:
                    self.within[-1] += seconds

        return run


def main(arguments: list[str]) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    from bi_compile.measure.models import make
    from bi_compile.vllm import worker

    clock = Clock()
    family = next((a for a in arguments if a != "eager"), "qwen3")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(VLLM_CACHE_ROOT=f"{folder}/vllm", TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor")
        model = make(family, Path(folder) / family, num_hidden_layers=2)
        for caches in ("cold", "warm"):
            clock.judging, start = 0.0, time.perf_counter()
            llm = requests.engine(
                {
                    "model": str(model), "dtype": "bfloat16", "kv_cache_memory_bytes": 2**28, "enforce_eager": "eager" in arguments,
                    "compilation_config": {"custom_passes": ["bi_ascend"]},
                }
            )  # fmt: skip
            whole = time.perf_counter() - start
            (held,) = worker._held.values()
            graphs = held.pipeline.summary.audit_seconds
            assert held.seen is not None
            print(
                f"{family}{' eager' if 'eager' in arguments else ''}, {caches} caches: start {whole:.2f} s; audit of graphs {graphs:.2f} s, of "
                f"{held.seen.calls.total()} uncompiled calls {clock.judging:.2f} s: {100 * (graphs + clock.judging) / whole:.1f} %",
                flush=True,
            )
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ.update({name: value for name, value in process.ENVIRONMENT.items() if name not in os.environ})
    main(sys.argv[1:])
