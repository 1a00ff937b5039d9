"""What `bi-compile bench engine` makes of the times that engines took on CUDA; `bi_compile.measure.serving` takes them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bi_compile.bench.measured import ratio_of_medians
from bi_compile.bench.serving import ENGINES, table, two_ranks
from bi_compile.measure import models, process
from bi_compile.measure.serving import CASES


def rounds(middle: float, spread: float, count: int = 20, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [middle * (1 + spread * rng.uniform(-1, 1)) for _ in range(count)]


def test_an_interval_holds_the_ratio_and_narrows_with_the_rounds() -> None:
    widths = []
    for count in (10, 160):
        ratio, low, high = ratio_of_medians(rounds(3.0, 0.2, count), rounds(2.0, 0.2, count, 1))
        assert low <= ratio <= high and low < 1.5 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert ratio_of_medians([3.0] * 5, [2.0] * 5) == (1.5, 1.5, 1.5)


def engine_found(speed: float, spread: float, seed: int, differ: int) -> dict[str, Any]:
    seconds = {case: rounds(speed, spread, seed=seed * 9 + j) for j, case in enumerate(CASES)}
    return {"differ": differ, "start": 60.0, "peak": 20.0, "seconds": seconds}


def test_three_engines_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def take_turns(module: str, plans: list[dict[str, Any]], *, at_once: int) -> list[dict[str, Any]]:
        assert (module, at_once) == ("bi_compile.measure.serving", 2)
        asked.extend(plans)
        return [engine_found(1.0, 0.01, i, 0) for i in range(len(plans))]

    monkeypatch.setattr(process, "take_turns", take_turns)
    monkeypatch.setattr(models, "make", lambda *args, **options: args[1])
    assert "2 GPUs" in two_ranks().title
    assert [plan["tensor_parallel_size"] for plan in asked] == [2, 2, 2]
    assert [plan["environment"].get("VLLM_BATCH_INVARIANT") for plan in asked] == [None, "1", None]
    assert asked[2]["compilation_config"] == {"custom_passes": ["bi_ascend"]}
    assert len({plan["environment"]["VLLM_CACHE_ROOT"] for plan in asked}) == 3


@pytest.mark.parametrize(("spread", "known"), [(0.01, len(CASES)), (0.4, 0)])
def test_the_table_says_how_well_its_ratios_are_known(spread: float, known: int) -> None:
    found = {
        name: engine_found(speed, spread, i, 16 if name == "vLLM" else 0)
        for i, (name, speed) in enumerate(zip(ENGINES, (2.0, 4.0, 1.9), strict=True))
    }
    measured = table(found)
    assert [row[0] for row in measured.rows] == list(CASES) and "vLLM 16, 60, 20.0" in measured.line
    assert f"{known} of {len(CASES)} ratios are known to 3 %" in measured.line
    for row, (requests, _, tokens) in zip(measured.rows, CASES.values(), strict=True):
        cells = dict(zip(measured.columns, row, strict=True))
        assert cells["unit"] == ("tok/s" if tokens > 1 else "ms")
        wanted = requests * tokens / 1.9 if tokens > 1 else 1900
        assert float(cells["with the pass"]) == pytest.approx(wanted, rel=spread)
        assert float(cells["pass / vLLM"]) == pytest.approx(2 / 1.9, rel=2 * spread)
        assert float(cells["pass / mode"]) == pytest.approx(4 / 1.9, rel=2 * spread)
