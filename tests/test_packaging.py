"""What is installed: the passes as bi_compile.passes from a wheel, an sdist and a checkout, and nothing called `passes`."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from bi_compile.cache_key import digest_of, source_digest, source_files
from bi_compile.passes import PASSES

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("packaging")  # what is built once serves all of them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, built from a copy: setuptools writes its own folders into the tree that it builds."""
    tree, out = tmp_path_factory.mktemp("tree") / "bi-compile", tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unwanted)
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
    assert not [n for n in names if n.startswith(("passes/", "tests/"))]
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = {m.name.partition("/")[2]: m for m in sdist.getmembers()}
    assert members["bi_compile/passes/matmul.py"].isfile() or members["bi_compile/passes"].issym()


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
