"""The report about a machine: what is measured on the device, and how a part that fails stands in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bi_compile import ops
from bi_compile.errors import ProcessError
from bi_compile.measure import device_report, probe, verify_vllm


def test_products_are_compared_as_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device_report.PRODUCTS, "cpu", (((1000, 520),), (1, 2, 17)))
    for found in device_report.products("cpu", 60):
        x, w = (
            torch.randn(n, 520, generator=g).to(getattr(torch, found["dtype"].removeprefix("torch.")))
            for g in [torch.Generator().manual_seed(0)]
            for n in (17, 1000)
        )
        alone = torch.mm(x[:1], w.t())
        for row in found["rows"]:
            native = torch.mm(x[: row["M"]], w.t())
            assert row["varies"] == (not torch.equal(native[:1], alone))
            assert row["as bi_compile::mm"] == torch.equal(native, ops.mm(x[: row["M"]], w.t()))
            assert row["torch.mm ms"] > 0 and row["bi_compile::mm ms"] > 0
    assert all("not run" in found for found in device_report.products("cpu", -1))


def test_an_operator_that_the_device_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    known = [p for p in probe.probes() if p.operator in ("aten.amax.default", "aten.bmm.default")]
    monkeypatch.setattr(device_report.pointwise, "operators", list)
    monkeypatch.setattr(probe, "probes", lambda: [*known, probe.Probe("aten.missing.default", missing, (((4,),),))])
    found = device_report.probed("cpu", 6)
    assert sorted(found["operators"]) == ["aten.amax.default", "aten.bmm.default"]
    assert found["failed"] == {"aten.missing.default": "no kernel"}


def test_a_part_that_fails_stands_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines are not started here: what is tested is that the other parts are kept."""

    def fails(*_: Any, **__: Any) -> Any:
        raise ProcessError("the engine's process failed")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(verify_vllm, "verify", fails)
    monkeypatch.setattr(device_report, "run_module", lambda *_: ({"batches": {"1": {"tokens_per_second": 2.0}}}, ""))
    monkeypatch.setattr(
        verify_vllm, "in_a_process", lambda *_: {"probe": {"operators": {}, "failed": {}}, "products": []}
    )
    report = device_report.collect(tmp_path, {})
    assert report["failed"] == dict.fromkeys(("verify", "without"), "the engine's process failed")
    assert report["versions"]["torch"] == torch.__version__ and report["machine"]["device"] == "cpu"
    said = list(device_report.lines(report))
    assert "FAILED: verify: the engine's process failed" in said
    assert "1 requests: 2.0 tokens a second with the pass, 2.0 without, ratio 1.00" in said
