"""Ascend's tiles in Triton's interpreter: a row keeps its bits, and no digit more is lost than by PyTorch.

A number of rows for each tile, and those around where they change. `sweep.py` by hand goes through all from 1 to 257.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SWEEP = Path(__file__).with_name("sweep.py")
NUMBERS = (1, 2, 16, 17, 33, 64, 65, 127, 129, 257)


def test_rows_keep_their_bits() -> None:
    """In a process of its own: `TRITON_INTERPRET` is read when Triton is imported."""
    command = [sys.executable, str(SWEEP), *map(str, NUMBERS)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=SWEEP.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
