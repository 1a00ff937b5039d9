"""What is installed: the passes as bi_compile.passes from a wheel, an sdist and a checkout, and nothing called `passes`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tomllib

from bi_compile.cache_key import digest_of, source_digest, source_files
from bi_compile.passes import PASSES

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("packaging")  # what is built once serves all of them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, built as a release is: from a clone at a tag, its links rewritten for PyPI.

    A copy, because setuptools writes its own folders into the tree that it builds."""
    tree, out = tmp_path_factory.mktemp("tree") / "bi-compile", tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(".git", ".[a-fh-z]*", "*.egg-info", "__pycache__", "build", "dist", "site")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unwanted)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"], ["tag", "v7.8.9"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tree, check=True)
    links = [sys.executable, tree / ".github" / "release_links.py", "https://host/owner/name", "v7.8.9"]
    subprocess.run(links, cwd=tree, check=True)
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "links"], cwd=tree, check=True
    )
    subprocess.run(["git", "tag", "-f", "v7.8.9"], cwd=tree, check=True, capture_output=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return out


def test_the_sdist_makes_the_wheel_and_both_hold_the_passes(built: Path) -> None:
    """`build` makes the wheel from the sdist, so a wheel with the passes means that the sdist had them."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for file in (ROOT / "passes").glob("*.py"):
        assert f"bi_compile/passes/{file.name}" in names
    for file in (ROOT / "bi_compile" / "kernels" / "cpu").glob("*.[ch]*"):
        assert f"bi_compile/kernels/cpu/{file.name}" in names
    for file in (ROOT / "bi_compile" / "report" / "page").iterdir():
        assert f"bi_compile/report/page/{file.name}" in names
    assert not [n for n in names if n.startswith(("passes/", "tests/"))]
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = {m.name.partition("/")[2]: m for m in sdist.getmembers()}
    assert members["bi_compile/passes/matmul.py"].isfile() or members["bi_compile/passes"].issym()


def test_the_version_is_the_tags_and_the_links_lead_out_of_pypi(built: Path) -> None:
    assert sorted(p.name for p in built.iterdir()) == ["bi_compile-7.8.9-py3-none-any.whl", "bi_compile-7.8.9.tar.gz"]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        page = wheel.read("bi_compile-7.8.9.dist-info/METADATA").decode()
    assert "Project-URL: Source, https://host/owner/name\n" in page
    targets = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r'(?:href|src|srcset)="([^"]+)"', page)
    assert targets and [t for t in targets if not t.startswith("https://")] == []
    ours = [t.partition("/v7.8.9/")[2].partition("#")[0] for t in targets if "/v7.8.9/" in t]
    assert ours and [name for name in ours if not (ROOT / name).is_file()] == []


def test_a_tree_without_tags_has_a_version(tmp_path: Path) -> None:
    """Unpacked from an archive, without git; an sdist carries its version."""
    from setuptools_scm import get_version

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    assert get_version(tmp_path, **settings) == settings["fallback_version"]
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: bi-compile\nVersion: 7.8.9\n")
    assert get_version(tmp_path, **settings) == "7.8.9"


def test_the_wheel_works_by_itself(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import sys, pathlib, bi_compile.passes as p\n"
        f"assert pathlib.Path(p.__file__).is_relative_to({str(tmp_path)!r}), p.__file__\n"
        "import torch, bi_compile\n"
        "assert not {'torch._dynamo', 'triton', 'vllm'} & set(sys.modules), 'import bi_compile is slow'\n"
        "with bi_compile.invariant(): print(torch.ones(3, 4).sum().item(), len(p.PASSES))\n"
        "try: import passes\n"
        "except ImportError: print('no top-level passes')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=_path(tmp_path), check=False
    )
    assert run.stdout.split("\n")[:2] == [f"12.0 {len(PASSES)}", "no top-level passes"], run.stdout + run.stderr


def test_checkout_sdist_and_wheel_have_one_digest(built: Path, tmp_path: Path) -> None:
    """So that certificates of one commit are equal, and caches are shared, however the package came here."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "wheel")
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    folders = (ROOT / "bi_compile", unpacked / "bi_compile", tmp_path / "wheel" / "bi_compile")
    files = [sorted(source_files(folder)) for folder in folders]
    assert files[0] == files[1] == files[2] and Path("passes/matmul.py") in files[0]
    assert len({digest_of(folder) for folder in folders}) == 1
    assert digest_of(folders[0]) == source_digest()


def _path(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_the_entry_points_are_found() -> None:
    groups = ("torch_dynamo_backends", "vllm.platform_plugins", "vllm.general_plugins")
    found = {g: [e.name for e in entry_points(group=g)] for g in groups}
    assert "bi_ascend" in found["torch_dynamo_backends"]
    assert "bi_compile" in found["vllm.platform_plugins"] and "bi_compile" in found["vllm.general_plugins"]
