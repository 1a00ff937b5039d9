"""Processes that take turns."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest

from bi_compile.measure.process import ProcessFailed, fastest_cpu, take_turns

PROGRAM = """
import json, pathlib, sys, time
from bi_compile.measure.process import wait_for_turn

plan = json.loads(sys.argv[1])
here, me = pathlib.Path(__file__).parent, plan["me"]
(here / f"began {me}").touch()
if me < plan["together"]:
    while not all((here / f"began {other}").exists() for other in range(plan["together"])):
        time.sleep(0.1)
else:
    assert all((here / f"ready {other}").exists() for other in range(me))
(here / f"ready {me}").touch()
turns = []
for _ in range(plan["rounds"]):
    wait_for_turn()
    turns.append([time.time()])
    time.sleep(0.05)
    turns[-1].append(time.time())
if not plan.get("fails"):
    print("RESULT", json.dumps(turns))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "takes_turns.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "takes_turns"


@pytest.mark.parametrize("at_once", [1, 2])
def test_one_works_at_a_time_and_the_first_ones_start_together(program: str, at_once: int) -> None:
    rounds = [3, 1, 3]
    plans = [{"me": me, "rounds": n, "together": at_once} for me, n in enumerate(rounds)]
    found = take_turns(program, plans, at_once=at_once)
    assert [len(turns) for turns in found] == rounds
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(sorted(itertools.chain(*found))))


def test_one_that_fails_is_named(program: str) -> None:
    plans = [{"me": 0, "rounds": 1, "together": 2}, {"me": 1, "rounds": 1, "together": 2, "fails": True}]
    with pytest.raises(ProcessFailed, match="takes_turns"):
        take_turns(program, plans, at_once=2)


def test_a_thread_runs_on_one_cpu_and_is_let_go() -> None:
    allowed, found = os.sched_getaffinity(0), []
    other = threading.Event()
    thread = threading.Thread(target=lambda: (other.wait(), found.append(os.sched_getaffinity(0))))
    thread.start()
    with pytest.raises(KeyError), fastest_cpu():
        bound = os.sched_getaffinity(0)
        assert len(bound) == 1 and bound <= allowed
        other.set()
        thread.join()
        raise KeyError
    assert os.sched_getaffinity(0) == allowed
    assert found == [allowed]  # other threads stay free
