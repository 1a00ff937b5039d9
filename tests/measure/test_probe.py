"""Probing: what was measured on this machine, and that the audit trusts no operator that was measured to vary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import captured, pipeline, rand
from torch import Tensor
from typer.testing import CliRunner

from bi_compile import AuditError, OptionError, Options
from bi_compile.audit.measured import read
from bi_compile.audit.report import Report
from bi_compile.audit.spec import Verdict
from bi_compile.cli import app
from bi_compile.errors import MeasureError
from bi_compile.measure import pointwise
from bi_compile.measure import probe as measured
from bi_compile.resolve import resolve
from bi_compile.table import Table, find_operator

WEIGHT = rand(512, 1536, seed=1)
TRUST = {"aten::mm": "somebody said so"}
#: some of those that `bi-compile probe` measures
OPERATORS = [f"aten.{name}.default" for name in ("mm", "amax", "silu", "exp", "relu", "neg")]

pytestmark = pytest.mark.xdist_group("probe")  # what is measured once serves all of them


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    # on a busy machine too every batch is compared: the default limit leaves some out there
    return measured.measure("cpu", operators=OPERATORS, time_limit=3600.0, compiled=False)


@pytest.fixture
def file(data: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "probe.json").write_text(json.dumps(data))
    return tmp_path / "probe.json"


def report_of(dtype: torch.dtype = torch.float32, **options: Any) -> Report:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(x @ w).neg()

    graph = captured(fn, rand(5, 512).to(dtype), WEIGHT.to(dtype)).graph
    return pipeline(**{"on_unproven": "warn", "passes": ("softmax",), **options}).audit(graph)


def verdict(report: Report, operator: str) -> tuple[Verdict, str]:
    (finding,) = [f for f in report.findings if f.operator == operator]
    return finding.verdict, finding.reason


def test_every_pointwise_operator_is_measured() -> None:
    with pytest.raises(MeasureError, match="is not among") as error:
        measured.measure(operators=["aten.none.default"])
    assert all(p.name in str(error.value) for p in pointwise.operators())


def test_products_vary_here_and_maxima_do_not(data: dict[str, Any]) -> None:
    """As was measured when the passes were written; and what was compared is counted."""
    products, maxima = data["operators"]["aten.mm.default"], data["operators"]["aten.amax.default"]
    assert products["float32"]["mismatches"] and "ULP" in products["float32"]["mismatches"][0]
    assert all(not d["mismatches"] and d["rows"] > 1000 and not d["batches_left"] for d in maxima.values())
    assert {"date", "device_name", "torch", "threads", "seed"} <= set(data)
    assert json.loads(json.dumps(data)) == data


def test_the_table_has_every_operator_that_varies_here(data: dict[str, Any]) -> None:
    """Run operator by operator, none that was measured to vary is left to the audit's rules of nature."""
    from bi_compile.passes import PASSES

    table = Table(PASSES, "cpu_eager")
    varies = [o for o, by_dtype in data["operators"].items() if any(d["mismatches"] for d in by_dtype.values())]
    assert "aten.silu.default" in varies
    assert not [o for o in varies if table.get(find_operator(o)) is None]


@pytest.mark.filterwarnings("ignore:bi_compile")
def test_a_trusted_operator_that_varies_is_objected_to(file: Path) -> None:
    assert verdict(report_of(trust=TRUST), "aten.mm.default")[0] is Verdict.TRUSTED
    found, reason = verdict(report_of(trust=TRUST, probe=str(file)), "aten.mm.default")
    assert found is Verdict.VARIANT and "measured to vary" in reason and "somebody said so" in reason
    with pytest.raises(AuditError, match="measured to vary"):
        report_of(trust=TRUST, probe=str(file), on_unproven="error")
    # another dtype was not measured
    assert verdict(report_of(torch.float64, trust=TRUST, probe=str(file)), "aten.mm.default")[0] is Verdict.TRUSTED


@pytest.mark.filterwarnings("ignore:bi_compile")
@pytest.mark.parametrize(
    ("inner", "where", "expected"),
    [
        ("inductor", "operators", Verdict.ROW_LOCAL),
        ("aot_eager", "operators", Verdict.VARIANT),
        ("inductor", "compiled", Verdict.VARIANT),
        ("aot_eager", "compiled", Verdict.ROW_LOCAL),
    ],
)
def test_row_local_operators_run_natively_or_not(
    data: dict[str, Any], tmp_path: Path, inner: str, where: str, expected: Verdict
) -> None:
    """A file that says (wrongly) that relu varies: natively, or in the code that Inductor generates."""
    said = json.loads(json.dumps(data))
    said[where]["aten.relu.default"] = json.loads(json.dumps(data["operators"]["aten.relu.default"]))
    said[where]["aten.relu.default"]["float32"]["mismatches"] = ["row 0 at place 1"]
    (tmp_path / "probe.json").write_text(json.dumps(said))
    report = report_of(trust=TRUST, probe=str(tmp_path / "probe.json"), inner=inner)
    assert verdict(report, "aten.relu.default")[0] is expected
    assert verdict(report, "aten.neg.default")[0] is Verdict.ROW_LOCAL


@pytest.mark.filterwarnings("ignore:bi_compile")
def test_an_unproven_operator_stays_unproven(tmp_path: Path) -> None:
    """That nothing was found is said beside the objection."""
    graph = captured(lambda x: torch.cumprod(x, -1), rand(5, 7)).graph
    said = measured.measure("cpu", operators=["aten.cumprod.default"])
    (tmp_path / "probe.json").write_text(json.dumps(said))
    found, reason = verdict(
        pipeline(on_unproven="warn", probe=str(tmp_path / "probe.json")).audit(graph), "aten.cumprod.default"
    )
    assert found is Verdict.UNPROVEN and "measured: no mismatch in" in reason and "proves nothing" in reason


def test_the_cache_key_follows_the_file(file: Path, data: dict[str, Any]) -> None:
    before = pipeline(probe=str(file)).uuid()
    assert before == pipeline(probe=str(file)).uuid() != pipeline().uuid()
    file.write_text(json.dumps({**data, "seed": 7}))
    assert pipeline(probe=str(file)).uuid() != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "1.0"}, ("'1.0' there", "run `bi-compile probe` again")),
        ({"device_name": "another"}, ("'another' there",)),
        ({"device": "meta"}, ("no device 'meta'",)),
        ({"format": 0}, ("format 0", "make it again")),
    ],
)
def test_a_stale_file_is_refused_and_the_doctor_says_so(
    file: Path, data: dict[str, Any], change: dict[str, Any], words: tuple[str, ...]
) -> None:
    from bi_compile.cli import doctor

    assert [line.state for line in doctor.probe(file)] == [doctor.OK]
    file.write_text(json.dumps({**data, **change}))
    with pytest.raises(OptionError) as error:
        resolve(Options(probe=str(file)))
    (line,) = doctor.probe(file)
    assert line.state == doctor.MISSING
    for word in words:
        assert word in str(error.value) and word in line.remedy


@pytest.mark.parametrize("text", [None, "", "[]", "{}"])
def test_what_is_no_probe_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "probe.json").write_text(text)
    with pytest.raises(OptionError, match="bi-compile probe"):
        resolve(Options(probe=str(tmp_path / "probe.json")))


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    result = CliRunner().invoke(app, ["probe", "--operator", "aten.amax.default", "--write", str(file)])
    assert result.exit_code == 0 and "rows equal" in result.output and str(file) in result.output
    assert list(read(file)["operators"]) == ["aten.amax.default"]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, ["probe", "--operator", "aten.sigmoid.default", "--write", str(file)]
    )
    native, compiled = (read(file)[way]["aten.sigmoid.default"]["float32"] for way in ("operators", "compiled"))
    assert result.exit_code == 0 and "aten.sigmoid.default, compiled" in result.output
    assert native["mismatches"] and not compiled["mismatches"] and compiled["rows"] > 100
    for arguments, word in ((["--operator", "aten.mm"], "is not among"), (["--device", "meta"], "no device 'meta'")):
        result = CliRunner().invoke(app, ["probe", *arguments, "--write", str(tmp_path / "other.json")])
        assert result.exit_code == 2 and word in result.output and not (tmp_path / "other.json").exists()
    with pytest.raises(MeasureError, match="is not among"):
        measured.measure(operators=["aten.mm"])
