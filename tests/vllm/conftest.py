from collections.abc import Callable
from pathlib import Path

import pytest

from bi_compile.measure.models import make


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a family, two layers deep, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda family: make(family, root / family, num_hidden_layers=2)
