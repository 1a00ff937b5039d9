"""Every test starts from the same seed, without graphs that another one compiled, and with PyTorch's own operators."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

# a graph that an earlier run left in Inductor's cache would be neither rewritten nor judged
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="bi_compile_tests_")

import pytest
import torch

from bi_compile import eager


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    for fallback in list(eager._installed):
        fallback.remove()
    torch._dynamo.reset()
