"""Dumps: a folder for each graph, programs that run by themselves, what changed, and the verdicts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import captured, pipeline, python, rand, traced
from torch import Tensor, fx

from bi_compile import Pipeline
from bi_compile.dump import program

HERE = str(Path(__file__).parent)


def model(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    h = torch.nn.functional.layer_norm(x @ w, [8])[ids]
    return h.softmax(-1) * (ids > 0)[:, None]


INPUTS = (rand(6, 4), rand(4, 8), torch.tensor([0, 2, 1, 5, 3]))


def ran(done: Pipeline, stage: str = "captured", dynamic: bool = False) -> fx.GraphModule:
    """One graph through the pipeline, audit included."""
    gm = captured(model, *INPUTS, dynamic=dynamic)
    done.rewrite(gm.graph, stage)
    done.audit(gm.graph)
    return gm


def programs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=path.parent, timeout=120, check=False
    )


def test_a_folder_for_each_graph(tmp_path: Path) -> None:
    done = pipeline(dump_dir=str(tmp_path))
    ran(done)
    ran(done, "final")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph_000_captured", "graph_001_final"]
    assert sorted(p.name for p in (tmp_path / "graph_000_captured").iterdir()) == [
        "00_before.py", "01_layer_norm.py", "02_softmax.py", "03_matmul.py",
        "after.json", "audit.json", "before.json", "changes.diff", "changes.json",
    ]  # fmt: skip


def test_the_folder_is_made(tmp_path: Path) -> None:
    ran(pipeline(dump_dir=str(tmp_path / "a" / "b")))
    assert (tmp_path / "a" / "b" / "graph_000_captured" / "audit.json").exists()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_program_runs_by_itself(tmp_path: Path, dynamic: bool) -> None:
    """And prints the sizes that the model gives."""
    ran(pipeline(dump_dir=str(tmp_path)), dynamic=dynamic)
    first, *_, final = programs(tmp_path)
    for path in (first, final):
        done = run(path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.split("\n")[0] == "0 (5, 8) torch.float32"


def test_every_program_computes_what_its_graph_does(tmp_path: Path) -> None:
    ran(pipeline(dump_dir=str(tmp_path)), dynamic=True)
    paths = programs(tmp_path)
    assert len(paths) == 4
    for path in paths:
        space: dict[str, Any] = {"__name__": "dumped"}
        exec(compile(path.read_text(), str(path), "exec"), space)
        inputs = [make() for make in space["INPUTS"]]
        given = iter(INPUTS)
        inputs = [next(given) if isinstance(i, Tensor) else i for i in inputs]
        (out,) = space["forward"](*inputs)
        torch.testing.assert_close(out, model(*INPUTS))


def test_programs_with_unusual_inputs_and_constants(tmp_path: Path) -> None:
    """Booleans, integers, half precision, strides, 0-d, empty, infinite numbers, a constant of the module."""
    constant = rand(4)

    def f(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(a, b.t().float(), float("-inf")).amax(-1) + c + constant.sum(), torch.cat([d, e])

    inputs = (
        rand(6, 4) > 0,
        rand(4, 6, dtype=torch.bfloat16),
        rand(),
        torch.empty(0, 3, dtype=torch.int32),
        torch.ones(2, 3, dtype=torch.int32),
    )
    gm = _real(f, *inputs)
    path = tmp_path / "p.py"
    path.write_text(program(gm.graph, "A title.", "p.py"))
    done = run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 (6,) torch.float32\n1 (2, 3) torch.int32\n"


def _real(f: Any, *inputs: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(f, tracing_mode="real")(*inputs)


def test_a_program_names_the_library_that_it_needs() -> None:
    library = torch.library.Library("elsewhere", "DEF")
    library.define("op(Tensor x) -> Tensor")
    library.impl("op", lambda x: x + 1, "CompositeExplicitAutograd")
    text = program(traced(lambda x: torch.ops.elsewhere.op(x), rand(3)).graph, "A title.", "p.py")
    library._destroy()
    assert "It needs the operators of elsewhere registered." in text and "A title." in text


def test_the_difference_is_from_first_to_last(tmp_path: Path) -> None:
    ran(pipeline(dump_dir=str(tmp_path)))
    diff = (tmp_path / "graph_000_captured" / "changes.diff").read_text()
    removed = [line for line in diff.splitlines() if line.startswith("-") and "torch.ops" in line]
    added = [line for line in diff.splitlines() if line.startswith("+") and "torch.ops" in line]
    assert diff.startswith("--- before\n+++ after\n")
    assert {re.search(r"ops\.(\S+?)\(", line)[1] for line in removed} >= {
        "aten.mm.default",
        "aten._softmax.default",
        "aten.native_layer_norm.default",
    }  # type: ignore[index]
    assert any("bi_compile.softmax" in line for line in added) and not any("bi_compile" in line for line in removed)


def test_what_each_pass_did_is_data(tmp_path: Path) -> None:
    gm = ran(pipeline(dump_dir=str(tmp_path)))
    data = json.loads((tmp_path / "graph_000_captured" / "changes.json").read_text())
    steps = data["passes"]
    assert data["nodes_before"] > 5 and data["nodes_after"] == len(
        [n for n in gm.graph.nodes if n.op == "call_function"]
    )
    assert [s["pass"] for s in steps] == ["layer_norm", "softmax", "matmul"]
    assert all(s["seconds"] >= 0 for s in steps)
    (change,) = steps[1]["changes"]
    assert (change["operator"], change["pass_name"], change["by"]) == (
        "aten._softmax.default",
        "softmax",
        ["bi_compile.softmax.default"],
    )


def test_the_verdicts_are_data(tmp_path: Path) -> None:
    gm = ran(pipeline(dump_dir=str(tmp_path)))
    report = json.loads((tmp_path / "graph_000_captured" / "audit.json").read_text())
    assert [n["node"] for n in report["nodes"]] == [n.name for n in gm.graph.nodes]
    assert report["counts"]["replaced"] == 3


def test_a_graph_without_changes_is_dumped_too(tmp_path: Path) -> None:
    done = pipeline(dump_dir=str(tmp_path))
    gm = captured(lambda x: x + 1, rand(3))
    done.rewrite(gm.graph, "captured")
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in programs(folder)] == ["00_before.py"]
    assert json.loads((folder / "changes.json").read_text()) == {"nodes_before": 1, "nodes_after": 1, "passes": []}
    assert not (folder / "changes.diff").read_text().strip()


def test_the_audit_of_a_refused_graph_is_written(tmp_path: Path) -> None:
    """It is what tells why."""
    done = pipeline(dump_dir=str(tmp_path))
    gm = captured(lambda x: x.cumprod(1), rand(3, 4))
    done.rewrite(gm.graph, "captured")
    with pytest.raises(Exception, match="cumprod"):
        done.audit(gm.graph)
    report = json.loads((tmp_path / "graph_000_captured" / "audit.json").read_text())
    assert report["counts"]["unproven"] == 1


TWO = """
import sys
sys.path.insert(0, sys.argv[2])
from test_dump import pipeline, ran
done = pipeline(dump_dir=sys.argv[1])
for _ in range(3):
    ran(done)
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Each graph keeps a folder of its own, with its own audit."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path), HERE], env=os.environ.copy(), stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 6 and all((f / "audit.json").exists() and len(programs(f)) == 4 for f in folders)


def test_a_later_process_counts_on(tmp_path: Path) -> None:
    ran(pipeline(dump_dir=str(tmp_path)))
    python(TWO, str(tmp_path), HERE)
    assert [p.name[:9] for p in sorted(tmp_path.iterdir())] == [f"graph_{i:03d}" for i in range(4)]


def test_a_program_with_vllms_operators_and_an_opaque_input(tmp_path: Path) -> None:
    """vLLM's name of a layer is an opaque object: it is made anew, and what registers the operators is imported."""
    pytest.importorskip("vllm.ir.ops")
    from torch._library.fake_class_registry import FakeScriptObject
    from vllm.utils.torch_utils import LayerName

    gm = traced(lambda x, w: torch.ops.vllm_ir.rms_norm.default(x, w, 1e-6), rand(3, 8), rand(8))
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        name = gm.graph.placeholder("layer")
    name.meta["val"] = FakeScriptObject(LayerName("model.layers.0"), "LayerName", LayerName("model.layers.0"))
    path = tmp_path / "p.py"
    path.write_text(program(gm.graph, "A title.", "p.py"))
    assert "0x" not in path.read_text() and "LayerName('model.layers.0')" in path.read_text()
    done = run(path)
    assert done.returncode == 0 and "0 (3, 8) torch.float32" in done.stdout, done.stdout + done.stderr


TRACED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_dump import Traced, torch
with torch.no_grad():
    torch.compile(Traced().eval(), backend="bi_ascend", dynamic=True)(torch.randn(8, 4))
"""


class Traced(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(-1)  # the line


def test_tlparse_shows_programs_difference_and_certificate(tmp_path: Path) -> None:
    """Without dump_dir, under TORCH_TRACE; a program prints as PyTorch's own do."""
    environment = os.environ | {"TORCH_TRACE": str(tmp_path / "trace")}
    done = subprocess.run([sys.executable, "-c", TRACED, HERE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tlparse = Path(sys.executable).parent / "tlparse"
    (log,) = (tmp_path / "trace").glob("*.log")
    made = subprocess.run([tlparse, log, "-o", tmp_path / "page", "--no-browser"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    index = (tmp_path / "page" / "index.html").read_text()
    for name in ("captured_00_before.py", "captured_02_matmul.py", "captured_changes.diff", "final_audit.json"):
        assert re.search(rf"bi_compile_graph_\d+_{name}", index), name
    (program_file,) = (tmp_path / "page").glob("*/bi_compile_graph_000_captured_00_before.py_*.txt")
    text = program_file.read_text()
    for said in (', 6][6, 1]cpu"', '"f32[4, 6][1, 4]cpu"', "# the line", "(inner.weight)", "test_dump.py:"):
        assert said in text, text
    (certificate,) = (tmp_path / "page").glob("*/bi_compile_graph_*_final_audit.json_*.txt")
    assert json.loads(certificate.read_text())["invariant"] is True
