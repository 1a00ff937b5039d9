"""What the pass costs on this CPU: tokens per second of vLLM with it and without.

    python -m bi_compile.demo.bench

Every request gets 64 tokens after a prompt of 5 to 60; the time of a whole set of requests counts, prompts included.
The model is the small one of the demonstration, so read the ratio, and only for this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .models import make
from .show import ENVIRONMENT

BATCHES = [1, 4, 16]


def throughput(plan: dict[str, Any]) -> dict[str, float]:
    """Tokens per second by batch size."""
    command = [sys.executable, "-m", "bi_compile.demo.requests", json.dumps(plan)]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    line = next((text for text in reversed(done.stdout.splitlines()) if text.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(
            f"{' '.join(command)}\nexit code {done.returncode}\n" + "\n".join(done.stdout.splitlines()[-40:])
        )
    return {
        size: found["tokens_per_second"] for size, found in json.loads(line.removeprefix("RESULT "))["batches"].items()
    }


def main() -> None:
    table = Table("dtype", "requests at once", title="vLLM on this CPU, tokens per second", title_justify="left")
    for name in ("without", "with bi_ascend", "ratio"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory(prefix="bi_compile_bench_") as folder:
        model = str(make("qwen3", Path(folder) / "qwen3"))
        for dtype in ("float32", "bfloat16"):
            # alone is measured before, so the engine is warm
            plan = {"model": model, "dtype": dtype, "tokens": 64, "batches": BATCHES}
            without = throughput(plan)
            with_ = throughput(plan | {"compilation_config": {"custom_passes": ["bi_ascend"]}})
            for size in map(str, BATCHES):
                table.add_row(
                    dtype, size, f"{without[size]:.0f}", f"{with_[size]:.0f}", f"{with_[size] / without[size]:.2f}"
                )
    Console().print(table)


if __name__ == "__main__":
    main()
