"""The page that `bi-compile report` makes: read in a browser, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from browser import needs_browser, opened, read_and_search, search
from support import captured, pipeline
from torch import Tensor, nn
from typer.testing import CliRunner

from bi_compile.cli import app

runner = CliRunner()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x)).softmax(-1)  # <b>the line to find</b>


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump") / "model"
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(nn.Sequential(Block(), Block()).eval(), backend="bi_ascend", options={"dump_dir": str(folder)})(
            torch.randn(4, 16)
        )
    return folder


def page_of(folder: Path, to: Path, *more: str) -> Path:
    done = runner.invoke(app, ["report", str(folder), "-o", str(to), *more])
    assert done.exit_code == 0 and f"written to {to}" in done.output, done.output
    return to


@needs_browser
def test_a_report_is_read_and_searched(dump: Path, tmp_path: Path) -> None:
    page = page_of(dump, tmp_path / "report.html")
    read_and_search(page, "aten._softmax.default", "bi_compile.softmax.default", "report/test_report.py")
    with opened(page) as tab:
        tab.click("[data-view=nodes]")
        assert search(tab, "the line to find") >= 6, "nodes are found by the code of their line"
        assert "<b>the line to find</b>" in tab.inner_text("#source .here"), "what a program says is text"
        for name, value in (
            ("pass", "layer_norm"),
            ("verdict", "replaced"),
            ("operator", "bi_compile.softmax.default"),
        ):
            tab.click("#clear")
            tab.select_option(f"[data-filter={name}]", value)
            rows = tab.locator("#list .row")
            assert rows.count() and rows.count() == int(tab.inner_text("#found").split()[0])
        assert search(tab, "nothing of this name") == 0
        assert "Nothing is found" in tab.inner_text("#list")
        tab.click("#clear")
        tab.keyboard.press("j")
        first = tab.inner_text("#detail h2")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("k")
        assert tab.inner_text("#detail h2") == first


@needs_browser
def test_a_refused_graph_says_why_first(tmp_path: Path) -> None:
    done = pipeline(dump_dir=str(tmp_path / "dump"), on_unproven="warn")
    gm = captured(lambda x: x.cumprod(1).softmax(-1), torch.randn(3, 4))
    done.rewrite(gm.graph, "captured")
    with pytest.warns(UserWarning, match="cumprod"):
        done.audit(gm.graph)
    with opened(page_of(tmp_path / "dump", tmp_path / "report.html")) as tab:
        assert tab.inner_text("#verdict") == "Not batch-invariant"
        assert "aten.cumprod.default" in tab.inner_text("main .card >> nth=0")
        tab.click("main .card >> nth=0 >> tbody tr")
        assert "unproven" in tab.inner_text("#detail") and tab.inner_text("#found").startswith("1 of")


@needs_browser
def test_a_compilation_that_stopped(dump: Path, tmp_path: Path) -> None:
    """Its nodes are there, and that none of them was judged."""
    shutil.copytree(dump / "graph_000_captured", tmp_path / "dump" / "graph_000_captured")
    for name in ("after.json", "changes.json", "changes.diff"):
        (tmp_path / "dump" / "graph_000_captured" / name).unlink()
    with opened(page_of(tmp_path / "dump", tmp_path / "report.html")) as tab:
        assert tab.inner_text("#verdict") == "The compilation stopped"
        assert search(tab, "aten._softmax.default") == 2
        assert "stopped before this graph was judged" in tab.inner_text("#detail")


@needs_browser
def test_the_curve_of_a_bisection(dump: Path, tmp_path: Path) -> None:
    steps = [
        {
            "operator": "aten.mm.default",
            "layer": "a",
            "where": "m.py, line 1",
            "elements": i % 3,
            "of": 9,
            "ulps": 10**i,
            "absolute": float("inf"),
        }
        for i in range(8)
    ]
    (tmp_path / "steps.json").write_text(json.dumps({"line": "the first operator whose row differs", "steps": steps}))
    page = page_of(dump, tmp_path / "report.html", "--bisect", str(tmp_path / "steps.json"))
    with opened(page) as tab:
        tab.click("[data-view=bisection]")
        assert tab.locator(".curve circle").count() == 8 and "the first operator" in tab.inner_text("main")


def test_the_page_is_one_file(dump: Path, tmp_path: Path) -> None:
    text = page_of(dump, tmp_path / "report.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"(?!data:)", text) and "Chris Pettitt" in text


def test_what_is_no_dump_is_refused(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "graph_000_final").mkdir()
    (tmp_path / "graph_000_final" / "before.json").write_text("{")
    (tmp_path / "empty").mkdir()
    shutil.copytree(dump / "graph_000_captured", tmp_path / "old" / "graph_000_captured")
    (tmp_path / "old" / "graph_000_captured" / "before.json").unlink()
    (tmp_path / "old" / "graph_001_final").mkdir()
    (tmp_path / "old" / "graph_001_final" / "before.json").write_text('{"frames": [], "nodes": []}')
    (tmp_path / "old" / "graph_000_captured" / "audit.json").write_bytes(
        (dump / "graph_001_final" / "audit.json").read_bytes()
    )
    for arguments, said in (
        ([str(tmp_path / "old")], "is not of this version"),
        ([str(tmp_path / "none")], "is not a folder"),
        ([str(tmp_path / "empty")], "holds no dump"),
        ([str(tmp_path)], "before.json"),
        ([str(dump), "-o", "/dev/null/a"], "--output"),
        ([str(dump), "--bisect", str(dump / "graph_000_captured" / "changes.json")], "is not a bisection"),
    ):
        done = runner.invoke(app, ["report", *arguments])
        assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output, done.output
