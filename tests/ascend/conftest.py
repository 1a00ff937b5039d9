"""The tests for Ascend run in an environment of their own (`make test-ascend`): torch_npu on stand-ins for CANN, no NPU."""

from __future__ import annotations

import os

import pytest

# vLLM's engine and our plugin in this process
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="session", params=["dense", "moe"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
