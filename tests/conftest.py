"""Every test starts from the same seed, without graphs that another one compiled, and with PyTorch's own operators.

Two engines run at a time, one of each group (`xdist_group("engine")`, `xdist_group("second engine")`): a worker has one core, and
they take most of the time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

# a graph that an earlier run left in Inductor's cache would be neither rewritten nor judged
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="bi_compile_tests_")

# programs that a test starts find what tests share, as pytest does
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "helpers"), os.environ.get("PYTHONPATH")))
)

# each of pytest-xdist's workers keeps to cores of its own: threads that wait for each other spin
if "PYTEST_XDIST_WORKER" in os.environ:
    worker, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[worker::workers] or cores)

import pytest

from bi_compile import eager


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest-xdist marks a test's group in its name; without that, each worker makes what the group shares."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if "PYTEST_XDIST_WORKER" in os.environ and any("@" not in item.nodeid for item in grouped):
        raise pytest.UsageError(
            "tests of one group would run in several workers: use --dist loadgroup and pytest < 9.2"
        )


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    for fallback in list(eager._installed):
        fallback.remove()
    torch._dynamo.reset()
