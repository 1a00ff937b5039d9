"""The cache key follows what changes a graph, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bi_compile.cache_key import WITHOUT, digest_of

FILES = (
    "pipeline.py",
    "audit/spec.py",
    "kernels/cpu/amx.h",
    "passes/matmul.py",
    *(f"{room}/show.py" for room in WITHOUT),
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name in FILES:
        file = tmp_path / "package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name}")
    return tmp_path / "package"


def edit(file: Path) -> None:
    file.write_text(file.read_text() + " edited")


@pytest.mark.parametrize("name", FILES)
def test_an_edit_changes_it_where_graphs_may_change(package: Path, name: str) -> None:
    before = digest_of(package)
    edit(package / name)
    assert (digest_of(package) != before) == (name.split("/")[0] not in WITHOUT)


@pytest.mark.parametrize(
    "change",
    [
        lambda package: (package / "pipeline.py").rename(package / "audit" / "pipeline.py"),
        lambda package: (package / "pipeline.py").unlink(),
        lambda package: (package / "audit" / "cli").mkdir() or (package / "audit" / "cli" / "new.py").write_text(""),
    ],
    ids=["moved", "removed", "added in a folder of another room's name"],
)
def test_it_follows_the_paths(package: Path, change: Callable[[Path], object]) -> None:
    before = digest_of(package)
    change(package)
    assert digest_of(package) != before


def test_a_link_to_the_passes_is_the_passes(package: Path) -> None:
    before = digest_of(package)
    (package / "passes").rename(package.parent / "passes")
    (package / "passes").symlink_to("../passes")
    assert digest_of(package) == before
    edit(package.parent / "passes" / "matmul.py")
    assert digest_of(package) != before


def test_what_python_leaves_behind_is_no_source(package: Path) -> None:
    before = digest_of(package)
    (package / "audit" / "__pycache__").mkdir()
    (package / "audit" / "__pycache__" / "spec.cpython-311.pyc").write_bytes(b"0")
    assert digest_of(package) == before
