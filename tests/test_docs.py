"""Every command and every piece of Python in the documentation is run, or says why it is not; tests/helpers/blocks.py has the marks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, blocks

ALL = [block for page in PAGES for block in blocks(page)]
#: the tour first: others use the folder and the file that it makes. The README's have a test of their own, tests/cli/test_readme.py.
SHELL = sorted(
    {b.page for b in ALL if b.runs and b.language == "sh"} - {ROOT / "README.md"},
    key=lambda p: (p.name != "tour.md", p),
)
PYTHON = list(dict.fromkeys(b.page for b in ALL if b.runs and b.language == "python"))

pytestmark = pytest.mark.xdist_group("docs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
    }
    return subprocess.run(
        command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=500, check=False
    )


def test_shell(folder: Path) -> None:
    """One test: later pages read the dump that the tour makes."""
    for page, block in [(p, b) for p in SHELL for b in blocks(p)]:
        if block.runs and block.language == "sh":
            done = run(["bash", "-e", "-c", block.body], folder)
            wanted = int(block.said) if block.key == "ends with" else 0
            assert done.returncode == wanted, f"{page}, line {block.line}:\n{done.stdout}{done.stderr}"


def test_python(folder: Path) -> None:
    """All pages in one process: most of the time is PyTorch's and its compiler's start."""
    done = run([sys.executable, str(ROOT / "tests" / "helpers" / "blocks.py"), *map(str, PYTHON)], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ran docs/") == len(PYTHON) >= 7


def test_every_block_is_run_or_says_why_not() -> None:
    """A new block without a language, or a mark that names no file, fails here."""
    for block in ALL:
        where = f"{block.page.relative_to(ROOT)}, line {block.line}"
        assert block.language in ("sh", "python", "text", "html"), f"{where}: sh, python or text?"
        if block.key == "tested by":
            assert (ROOT / block.said).is_file(), f"{where} names {block.said}"
        elif block.key == "needs":
            assert len(block.said) > 5, where
    assert len(ALL) == sum(len(re.findall(r"^ *```\w", page.read_text(), re.M)) for page in PAGES)
    # what starts with a command and is no block is a command that nobody runs
    for page in PAGES:
        assert not re.findall(
            r"^(?: {4,}|\$ )(?:bi-compile|pip|vllm|make) ", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
        )
