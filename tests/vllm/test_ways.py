"""Ways to serve (`ways.py`): requests of every kind in one batch; and what the page says of each way has something behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ways
from engines import python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("engine")


def test_requests_of_every_kind_together(tmp_path: Path) -> None:
    asked = [way.name for way in ways.WAYS if not way.alone]
    done = python([ways.__file__, "--here", str(tmp_path), *asked])
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")] or [done.stdout[-3000:]]
    assert json.loads(line.removeprefix("RESULT ")) == {name: {"differ": 0} for name in asked}


def test_each_way_names_a_test_that_is_there() -> None:
    for way in ways.WAYS:
        assert not way.tests or (ROOT / way.tests).is_file(), way
        assert way.tests or way.by_hand or not way.alone, f"{way.name}: nobody runs it"
    assert len({way.name for way in ways.WAYS}) == len(ways.WAYS)
