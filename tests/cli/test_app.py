"""The command line: what it prints, how it refuses, how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bi_compile.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Softmax(-1)).eval()
    with torch.no_grad():
        torch.compile(model, backend="bi_ascend", options={"dump_dir": str(folder)})(torch.randn(4, 32))
    return folder


def test_inspect_shows_graphs_passes_and_counts(dump: Path) -> None:
    result = runner.invoke(app, ["inspect", str(dump)])
    assert result.exit_code == 0, result.output
    for word in (
        "graph_000_captured",
        "graph_001_final",
        "softmax",
        "matmul",
        "bi_compile.softmax.default",
        "invariant",
    ):
        assert word in result.output, result.output
    assert "not invariant" not in result.output


def test_inspect_shows_what_is_left_with_reason_and_line(dump: Path, tmp_path: Path) -> None:
    """A dump of a graph that was refused."""
    for source in dump.glob("graph_001_final/*"):
        (tmp_path / "graph_000_final").mkdir(exist_ok=True)
        (tmp_path / "graph_000_final" / source.name).write_bytes(source.read_bytes())
    path = tmp_path / "graph_000_final" / "audit.json"
    report = json.loads(path.read_text())
    report["nodes"][0] |= {
        "operator": "my.op.default",
        "verdict": "unproven",
        "reason": "nothing is known [of it]",
        "where": "m.py, line 7",
    }
    report["nodes"][1] |= {
        "operator": "my.other.default",
        "verdict": "trusted",
        "reason": "row by row",
        "where": "m.py, line 8",
    }
    path.write_text(json.dumps(report))
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for word in (
        "not invariant",
        "my.op.default",
        "nothing is known [of it]",
        "m.py, line 7",
        "my.other.default",
        "row by row",
    ):
        assert word in result.output, result.output


def test_inspect_of_a_folder_that_is_no_dump(tmp_path: Path) -> None:
    for folder, word in ((tmp_path, "holds no dump"), (tmp_path / "none", "is no folder")):
        result = runner.invoke(app, ["inspect", str(folder)])
        assert result.exit_code == 2
        assert word in result.output and "dump_dir" in result.output
        assert "Traceback" not in result.output


def test_inspect_of_a_damaged_dump(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "graph_000_final").mkdir()
    (tmp_path / "graph_000_final" / "00_before.py").write_bytes(
        next(dump.glob("graph_001_final/00_before.py")).read_bytes()
    )
    (tmp_path / "graph_000_final" / "changes.json").write_text("{")
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 2 and "changes.json" in result.output


def test_doctor_finds_a_working_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("VLLM_PLUGINS", "VLLM_TARGET_DEVICE", "VLLM_CPU_ATTN_SPLIT_KV"):
        monkeypatch.delenv(setting, raising=False)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("torch", "kernels: cpu", "torch_dynamo_backends", "vllm.platform_plugins", "bi_ascend"):
        assert word in result.output, result.output


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("VLLM_PLUGINS", "other", "other,bi_compile"),
        ("VLLM_TARGET_DEVICE", "cpu", "unset"),
        ("VLLM_CPU_ATTN_SPLIT_KV", "1", "unset"),
    ],
)
def test_doctor_finds_a_setting_that_takes_the_guarantee_away(
    setting: str, value: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    from bi_compile.cli import doctor

    monkeypatch.setenv(setting, value)
    found = [line for line in doctor.vllm() if line.what == setting]
    assert [line.state for line in found] == [doctor.MISSING] and remedy in found[0].remedy


def test_passes_lists_every_operator() -> None:
    from bi_compile.passes import PASSES

    result = runner.invoke(app, ["passes", "--markdown"])
    assert result.exit_code == 0, result.output
    for p in PASSES:
        assert f"## {p.name}" in result.output
        assert all(f"`{e.operator}`" in result.output for e in p.entries)


def test_every_replacement_says_by_what() -> None:
    """None is shown as computed with row-local operators alone unless it is."""
    from bi_compile.cli import reference
    from bi_compile.passes import PASSES

    assert reference.called(next(e for e in PASSES[1].entries if e.operator.startswith("aten.")).replacement) == [
        "bi_compile::rms_norm"
    ]
    assert all(reference.by_what(e) for p in PASSES for e in p.entries)


@pytest.mark.parametrize("arguments", [["nothing"], ["inspect"], ["passes", "--html"]])
def test_unknown_commands_and_options(arguments: list[str]) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_the_entry_point_exits_as_it_says(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "bi-compile"
    done = subprocess.run([script, "inspect", str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("bi-compile: ") and not done.stdout


def test_importing_the_command_line_imports_no_compiler() -> None:
    code = "import sys, bi_compile.cli; sys.exit('torch._inductor.compile_fx' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bench_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    from bi_compile.bench import cpu

    table = Table("M", "ratio")
    table.add_row("1", "0.97")
    monkeypatch.setattr(cpu, "BENCHES", {"product": lambda: (table, "a mean")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", "--csv", str(tmp_path / "new")])
    assert done.exit_code == 0 and "product: a mean" in done.output
    assert (tmp_path / "new" / "product.csv").read_text().split() == ["M,ratio", "1,0.97"]
    for arguments, said in (
        (["prodct"], "unknown benchmark prodct: known here are product"),
        (["--csv", "/dev/null/a"], "cannot be written"),
    ):
        refused = CliRunner().invoke(app, ["bench", *arguments])
        assert refused.exit_code == 2 and said in refused.output
