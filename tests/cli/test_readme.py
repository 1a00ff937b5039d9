"""The README's one-liners run, and say what it claims; the generated page is what the passes say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = [
    b for b in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if b.startswith('python -c "')
]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start; the example does not need it
}


def name(block: str) -> str:
    return next(n for n in ("vllm", "dump_dir", "torch.compile", "invariant") if n in block)


ENGINE = pytest.mark.xdist_group("engine")


def test_the_dump_is_that_of_the_tour() -> None:
    """Which tests/test_docs.py runs."""
    (block,) = (b for b in BLOCKS if name(b) == "dump_dir")
    assert textwrap.indent(block, "    ") in (ROOT / "docs" / "tour.md").read_text()


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=name(b), marks=ENGINE if name(b) == "vllm" else ()) for b in BLOCKS if name(b) != "dump_dir"],
)
def test_one_liner(block: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-e", "-c", block],
        cwd=tmp_path,
        env=os.environ | QUIET | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bits alone and together: True" in done.stdout, done.stdout + done.stderr


def test_there_is_a_one_liner_for_each_face() -> None:
    assert sorted(map(name, BLOCKS)) == ["dump_dir", "invariant", "torch.compile", "vllm"]


def test_operators_page_is_up_to_date() -> None:
    from bi_compile.cli.reference import markdown

    assert (ROOT / "docs" / "reference" / "operators.md").read_text() == markdown(), "run `make docs`"


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def headings(page: Path) -> set[str]:
    """The anchors that a renderer makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            name, _, heading = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), target
            assert not heading or heading in headings(linked), target


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", index.read_text())}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page != index} <= linked


def test_pages_and_files_that_are_named_exist() -> None:
    """Pages that code names, and files of the repository that pages name."""
    files = [*(ROOT / "bi_compile").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "Makefile", *PAGES]
    for file in files:
        for name in re.findall(
            r"(?<![\w/])(?:docs|bi_compile|passes|tests)/[\w/.-]*\w\.(?:md|py|cpp|h)\b", file.read_text()
        ):
            assert (ROOT / name).exists(), f"{file.relative_to(ROOT)} names {name}"


def test_the_walks_name_functions_that_stand_there() -> None:
    """At most six files each."""
    walks = (ROOT / "CONTRIBUTING.md").read_text().split("## Two walks")[1].split("\n## ")[0]
    steps = re.findall(r"^\| (\d) \| `([^`]+)` \| `(\w+)` \|", walks, re.M)
    assert [int(number) for number, _, _ in steps] == [*range(1, 7), *range(1, 7)]
    for _, file, name in steps:
        assert re.search(rf"^(def |class )?{name}\b", (ROOT / file).read_text(), re.M), f"{file} has no {name}"


def test_the_page_of_the_command_line_has_every_command_and_exit_code() -> None:
    from typer.main import get_command

    from bi_compile.cli import app, exits

    page = (ROOT / "docs" / "use" / "command-line.md").read_text()
    assert set(get_command(app).commands) == set(re.findall(r"^\| `bi-compile (\w+)", page, re.M))
    written = dict(re.findall(r"^ +(\d+)  (.*)$", exits.__doc__ or "", re.M))
    assert written == dict(re.findall(r"^\| (\d+) \| (.*) \|$", page, re.M)) and len(written) == 5
