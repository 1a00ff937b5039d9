"""A sample of helpers/people.py: programs that people compile have equal rows, whatever the batch and however often compiled."""

from __future__ import annotations

import pytest
from people import PROGRAMS, differ


@pytest.mark.parametrize("name", ["a diffusion UNet in small", "nn.LSTM, two layers, both directions"])
def test_rows_are_equal(name: str) -> None:
    assert differ(PROGRAMS[name], backend="bi_ascend", options={"inner": "eager"}) == "0 of 6"
