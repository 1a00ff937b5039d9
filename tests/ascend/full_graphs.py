"""cudagraph_mode FULL with every kind of model of test_engine.py: whole steps, prompts too, in one graph.

    LD_LIBRARY_PATH=.venv-ascend/cann .venv-ascend/bin/python tests/ascend/full_graphs.py     # some 4 minutes of a core

Prints how many of 16 requests differ between alone and together, how many steps were replayed, and whether each answer is what
eager code gives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import npu_models
import test_engine


def main() -> None:
    cases = {"FULL": test_engine.FULL["FULL"], "eager": test_engine.WITH["eager fallback alone"]}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for kind in test_engine.KINDS:
            model = str(npu_models.make(kind, Path(folder, kind)))
            for case, (arguments, environment) in cases.items():
                cache = {"VLLM_CACHE_ROOT": str(Path(folder, f"cache of {kind}, {case}"))}
                log = str(Path(folder, f"{kind}, {case}.log"))
                jobs[f"{kind}, {case}"] = {
                    "model": model,
                    "arguments": arguments,
                    "environment": environment | cache,
                    "log": log,
                }
        command = [sys.executable, str(test_engine.SERVE), json.dumps(jobs)]
        subprocess.run(command, env=os.environ | test_engine.variables(), check=True)
        found = {
            name: json.loads(Path(job["log"]).read_text().strip().splitlines()[-1])[name] for name, job in jobs.items()
        }
    for kind in test_engine.KINDS:
        full, eager = found[f"{kind}, FULL"], found[f"{kind}, eager"]
        same = sum(a == b for a, b in zip(full["answers"], eager["answers"], strict=True))
        print(
            f"{kind}: {full['differ']} of {full['of']} differ, {full['differ behind a cached prefix']} behind a cached prefix, "
            f"{full['graphs']['replayed']} steps replayed, {same} of {full['of']} answers as eager code gives them"
        )


if __name__ == "__main__":
    main()
