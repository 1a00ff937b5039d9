"""A certificate says what was judged; two are compared; one that is truncated or foreign is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import knowledge, pipeline, rand, traced_rows
from torch import Tensor, fx
from typer.testing import CliRunner

from bi_compile import OptionError
from bi_compile.audit import certificate
from bi_compile.audit.certificate import read
from bi_compile.audit.compare import compare
from bi_compile.audit.report import audit
from bi_compile.cli import app

runner = CliRunner()


def model(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).softmax(-1)


def certified(folder: Path, w: Tensor | None = None, **options: Any) -> Path:
    """The audit.json of `model` with the weight `w`, [12, 12] if none is given."""
    done = pipeline(dump_dir=str(folder), on_unproven="warn", **options)
    gm = traced_rows(model, rand(5, 12), rand(12, 12) if w is None else w)
    done.rewrite(gm.graph, "final")
    done.audit(gm.graph)
    (path,) = folder.glob("graph_*/audit.json")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return certified(tmp_path / "a")


def test_it_holds_what_the_proof_rests_on(path: Path) -> None:
    (c,) = read(path).values()
    assert c["invariant"] and c["target"] == "cpu" and c["versions"]["torch"] == torch.__version__
    assert [p["name"] for p in c["passes"]][:2] == ["add_rms_norm", "rms_norm"] and all(p["uuid"] for p in c["passes"])
    by_operator = {n["operator"]: n for n in c["nodes"]}
    product = by_operator["bi_compile.mm.default"]
    assert (product["rows_in"], product["rows_out"], product["verdict"]) == ({"x_1": [0]}, [0], "replaced")
    assert by_operator["w_1"]["value"] == "float32[12, 12]"


def test_the_same_twice_has_no_difference(path: Path, tmp_path: Path) -> None:
    again = certified(tmp_path / "b")
    result = runner.invoke(app, ["audit", "--check", str(path), str(again)])
    assert result.exit_code == 0 and "no difference: the same graphs" in result.output, result.output


def differences(a: Path, b: Path) -> dict[str, tuple[str, str]]:
    (one,), (other,) = read(a).values(), read(b).values()
    return {d.what: (d.a, d.b) for d in compare(one, other)}


def test_another_shape_of_a_weight_is_named_first(path: Path, tmp_path: Path) -> None:
    other = certified(tmp_path / "b", rand(12, 24))
    found = differences(path, other)
    assert next(iter(found.items())) == ("input w_1: value", ("float32[12, 12]", "float32[12, 24]"))
    result = runner.invoke(app, ["audit", "--check", str(path), str(other)])
    assert result.exit_code == 1 and "input w_1: value" in result.output and "float32[12, 24]" in result.output


def test_a_pass_less_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="aten.mm"):
        other = certified(tmp_path / "b", passes=("softmax",))
    found = differences(path, other)
    assert found["pass matmul"][1] == "" and found["pass matmul"][0]
    assert "pass softmax" not in found
    assert any(what.startswith("node ") and pair[1].startswith("aten.mm") for what, pair in found.items())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["versions"].update(torch="9.9"), "version of torch"),
        (lambda c: c["versions"].update(triton="9.9"), "version of triton"),
        (lambda c: c["passes"][3].update(uuid="0" * 64), "pass softmax"),
        (lambda c: c["passes"].reverse(), "order of the passes"),
        (lambda c: c.update(source="0" * 64), "source of bi_compile"),
        (lambda c: c["trust"].update({"my::op": "row by row"}), "trust in my::op"),
        (lambda c: c.update(target="cuda"), "target"),
        (lambda c: c["nodes"][2].update(verdict="trusted"), "node mm_default: verdict"),
    ],
)
def test_one_change_is_one_difference(path: Path, tmp_path: Path, change: Any, what: str) -> None:
    data = json.loads(path.read_text())
    change(data)
    other = tmp_path / "audit.json"
    other.write_text(json.dumps(data))
    found = list(differences(path, other))
    assert found == [what] or (what.startswith("node") and len(found) == 1 and found[0].endswith(": verdict"))


def test_one_more_input_is_one_difference(path: Path, tmp_path: Path) -> None:
    """Although it renames every symbol, and the numbers of all that is computed after it."""

    def more(x: Tensor, n: Tensor, w: Tensor) -> Tensor:
        return (x @ w).softmax(-1)

    done = pipeline(dump_dir=str(tmp_path / "b"))
    gm = traced_rows(more, rand(5, 12), rand(7, 3), rand(12, 12))
    for i, node in enumerate(list(gm.graph.nodes)):
        node._rename(f"node_{i}")
    done.rewrite(gm.graph, "final")
    done.audit(gm.graph)
    found = differences(path, next((tmp_path / "b").glob("graph_*/audit.json")))
    assert [what for what in found if not what.endswith("where")] == ["input node_1"], found


def test_an_output_is_said_to_be_one(tmp_path: Path) -> None:
    def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ w
        return product.softmax(-1), product

    one = certified(tmp_path / "a")
    done = pipeline(dump_dir=str(tmp_path / "b"))
    gm = traced_rows(two, rand(5, 12), rand(12, 12))
    done.rewrite(gm.graph, "final")
    done.audit(gm.graph)
    found = differences(one, next((tmp_path / "b").glob("graph_*/audit.json")))
    assert any(what.startswith("output: ") for what in found) and not any("input" in what for what in found), found


def test_the_published_schema(path: Path) -> None:
    """A real certificate has its form; one that lacks a part, or has one of another type, has not."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(certificate.__file__).parent / "certificate.schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    data = json.loads(path.read_text())
    check.validate(data)
    for key in (*data, "new"):
        less = {k: v for k, v in data.items() if k != key} | ({"new": 1} if key == "new" else {})
        assert not check.is_valid(less), key
        assert key == "new" or not check.is_valid(data | {key: 3.5}), key
    for key in data["nodes"][0]:
        node = {k: v for k, v in data["nodes"][0].items() if k != key}
        assert not check.is_valid(data | {"nodes": [node]}), key


def test_trust_of_the_user_is_in_it(tmp_path: Path) -> None:
    (c,) = read(certified(tmp_path / "c", trust={"aten::prod": "row by row"})).values()
    assert c["trust"] == {"aten::prod": "row by row"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "is truncated, or is not JSON"),
        (lambda text: "", "is truncated, or is not JSON"),
        (lambda text: '{"target": "cpu"}', "is not a certificate of this version of bi_compile: its format is None"),
        (lambda text: "[1]", "is not a certificate"),
        (lambda text: json.dumps({"format": "bi_compile certificate 1"}), r"is not a whole certificate \(graph, target"),
        (lambda text: text.replace("bi_compile.mm.default", "aten.mm.default"), "was changed: its nodes do not have the hash"),
    ],
    ids=["half", "empty", "foreign", "a list", "without content", "changed"],
)  # fmt: skip
def test_what_is_no_certificate_is_refused_in_a_sentence(path: Path, content: Any, sentence: str) -> None:
    path.write_text(content(path.read_text()))
    with pytest.raises(OptionError, match=sentence):
        read(path)
    result = runner.invoke(app, ["audit", str(path)])
    assert result.exit_code == 2 and result.output.count("\n") == 1


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds no certificate"):
        read(tmp_path)
    with pytest.raises(OptionError, match="cannot be read"):
        read(tmp_path / "nothing")


def test_it_is_printed_as_a_table(path: Path) -> None:
    for where in (path, path.parent, path.parent.parent):
        result = runner.invoke(app, ["audit", str(where)])
        assert result.exit_code == 0, result.output
        for word in ("batch-invariant on cpu", "bi_compile.mm.default", "replaced", "passes add_rms_norm", "not shown"):
            assert word in result.output, result.output
        assert "x_1" not in result.output, "what is row-local is shown when it is asked for"


def test_what_is_asked_for_is_shown(path: Path) -> None:
    def said(*arguments: str) -> str:
        result = runner.invoke(app, ["audit", str(path), *arguments], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        return result.output

    everything = said("--all")
    assert "x_1: 0" in everything and "output" in everything and "not shown" not in everything
    assert "bi_compile.softmax" in said("--op", "softmax") and "bi_compile.mm" not in said("--op", "softmax")
    assert "x_1" in said("--verdict", "row-local") and "bi_compile.mm" not in said("--verdict", "row-local")
    (found,) = json.loads(said("--json", "--verdict", "replaced", "--op", "mm")).values()
    assert [n["operator"] for n in found["nodes"]] == ["bi_compile.mm.default"] and found["invariant"]
    (whole,) = json.loads(said("--json")).values()
    assert whole == json.loads(path.read_text())
    refused = runner.invoke(app, ["audit", str(path), "--verdict", "bad"])
    assert refused.exit_code == 2 and "the verdicts are row-local" in refused.output


def test_names_are_whole_at_80_columns(path: Path) -> None:
    """Folded, not cut."""
    for command in (["audit", str(path)], ["audit", str(path), "--all"], ["inspect", str(path.parents[1])]):
        output = runner.invoke(app, command, env={"COLUMNS": "80"}).output
        assert max(map(len, output.splitlines())) <= 80 and "…" not in output, output


def test_check_takes_two_paths(path: Path) -> None:
    assert runner.invoke(app, ["audit", "--check", str(path)]).exit_code == 2
    assert runner.invoke(app, ["audit", str(path), str(path)]).exit_code == 2


def test_an_object_has_no_address() -> None:
    """Which differs from process to process: vLLM hands the names of its layers to a graph as such objects."""
    graph = fx.Graph()
    graph.placeholder("x").meta["val"] = object()
    graph.output(())
    (finding, _) = audit(graph, knowledge()).findings
    assert finding.value == "<object object>"
