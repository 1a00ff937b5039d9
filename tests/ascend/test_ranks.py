"""Two ranks of the real vllm-ascend on emulated NPUs. `serve_ranks.py` by hand serves any model in any mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import npu_models
import test_engine


def test_tensor_parallelism_over_two_ranks(tmp_path: Path) -> None:
    """Compiled, with attention between captured graphs; the sums over ranks, which a replay takes again, are sums."""
    cases = {"pass manager": test_engine.WITH["pass manager"][0]}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("serve_ranks.py")), str(npu_models.make("dense", tmp_path / "model")), json.dumps(cases)],
        env=os.environ | test_engine.variables(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])["pass manager"]
    assert found["differ"] == 0
    assert found["graphs"]["replayed"] > 10
    assert found["collectives"]["c10d::allgather_into_tensor_coalesced_"] > 0
    assert found["from one rank"] < 0.01
