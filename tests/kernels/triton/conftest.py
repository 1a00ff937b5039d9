"""The Triton kernels, on CUDA, or in Triton's interpreter where there is none.

They run in a pytest session of their own (`make test-triton`; `pytest tests/kernels/triton`): Triton reads TRITON_INTERPRET when
it is imported, and no other test may meet an interpreted Triton.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "tests/kernels/triton needs Triton's interpreter, and Triton was already imported without it: run these tests by "
            "themselves, `pytest tests/kernels/triton`, or set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

    import interpreter

    interpreter.install()
