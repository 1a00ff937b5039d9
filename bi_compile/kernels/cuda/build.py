"""Compile the C++ in this folder, once for each source, PyTorch and CUDA, with the machine's C++ compiler: no nvcc.

The headers come with PyTorch's own wheels (cuBLASLt, the runtime) and with Triton (the rest), or from CUDA_HOME.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_SOURCES = [_HERE / name for name in ("product.cpp", "rows.cpp")]
_FLAGS = ["-O2", "-std=c++20"]
#: headers that the sources include, each in a folder of its own in PyTorch's wheels
_HEADERS = ("cublasLt.h", "cuda_runtime_api.h", "cuda.h", "crt/host_defines.h")


def _include_folders() -> list[Path]:
    """Where CUDA's headers may lie, those of the libraries that PyTorch loads first."""
    folders: list[Path] = []
    nvidia = importlib.util.find_spec("nvidia")
    for root in nvidia.submodule_search_locations or () if nvidia is not None else ():
        folders += sorted(p for p in Path(root).glob("*/include") if p.is_dir())
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            folders.append(Path(os.environ[name]) / "include")
    folders.append(Path("/usr/local/cuda/include"))
    triton = importlib.util.find_spec("triton")
    for root in triton.submodule_search_locations or () if triton is not None else ():
        folders.append(Path(root) / "backends" / "nvidia" / "include")
    return [folder for folder in folders if folder.is_dir()]


def _require(folders: list[Path]) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    remedies = {compiler: "install g++ 11 or newer, or name a C++20 compiler in CXX", "ninja": "pip install ninja"}
    for tool, remedy in remedies.items():
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool!r} is not on the PATH: {remedy}")
    for header in _HEADERS:
        if not any((folder / header).is_file() for folder in folders):
            raise RuntimeError(
                f"CUDA's header {header} is in none of {', '.join(map(str, folders)) or 'the usual folders'}: "
                f"pip install nvidia-cublas and nvidia-cuda-runtime in PyTorch's versions (CUDA {torch.version.cuda}), or set CUDA_HOME"
            )


def name() -> str:
    """The library's name, different for each source, setting, torch and CUDA: an older build is never loaded."""
    digest = hashlib.sha256()
    for path in sorted([*_SOURCES, *_HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    for text in (*_FLAGS, torch.__version__, str(torch.version.cuda), platform.python_version(), platform.machine()):
        digest.update(text.encode())
    return f"bi_compile_cuda_{digest.hexdigest()[:16]}"


def folder() -> Path:
    """Where the library is built; proofs lie beside it."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / name()


def _compile(target: Path) -> None:
    from torch.utils import cpp_extension  # here: it takes a second to import, and a finished build needs none of it

    path = os.environ.get("PATH", "")
    # the ninja of a virtual environment that was not activated
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        folders = _include_folders()
        _require(folders)
        cpp_extension.load(
            name(),
            [str(source) for source in _SOURCES],
            extra_cflags=_FLAGS,
            # cuBLASLt and the runtime are those that libtorch_cuda has loaded
            extra_ldflags=["-Wl,--no-as-needed", "-lc10_cuda", "-ltorch_cuda"],
            extra_include_paths=[str(folder) for folder in folders],
            build_directory=str(target),
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = path


def load() -> None:
    """Load the C++ operators. The first process compiles them, the others wait; later ones find the build.

    Raises:
        RuntimeError: there is no C++ compiler, no ninja or no header of CUDA's, or the compiler failed.
    """
    target = folder()
    finished = target / "finished"
    if not finished.exists():
        target.mkdir(parents=True, exist_ok=True)
        with open(target / "flock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, unlike torch's own lock file, which
            (target / "lock").unlink(missing_ok=True)  # would make everyone wait for a process that was killed
            if not finished.exists():
                _compile(target)
                finished.touch()
                return
    torch.ops.load_library(str(target / f"{name()}.so"))
