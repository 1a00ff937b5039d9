"""The Triton kernels: `triton_suite` on CUDA, or in Triton's interpreter where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SUITE = Path(__file__).with_name("triton_suite.py")


def test_the_suite() -> None:
    """In a process of its own: `TRITON_INTERPRET` is read when Triton is imported."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(SUITE)]
    done = subprocess.run(
        command, env=os.environ | interpreted, cwd=SUITE.parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
