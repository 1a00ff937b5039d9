"""The C++ in this folder, compiled with the machine's C++ compiler: no nvcc.

The headers come with PyTorch's own wheels (cuBLASLt, the runtime) and with Triton (the rest), or from CUDA_HOME.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

import torch

from ..build import Extension

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


def _folders_with_headers() -> list[Path]:
    folders = _include_folders()
    for header in _HEADERS:
        if not any((folder / header).is_file() for folder in folders):
            raise RuntimeError(
                f"CUDA's header {header} is in none of {', '.join(map(str, folders)) or 'the usual folders'}: "
                f"pip install nvidia-cublas and nvidia-cuda-runtime in PyTorch's versions (CUDA {torch.version.cuda}), or set CUDA_HOME"
            )
    return folders


EXTENSION = Extension(
    "bi_compile_cuda",
    Path(__file__).parent,
    ("product.cpp", "rows.cpp", "launches.cpp", "attention.cpp", "recorded.cpp"),
    ("-O2", "-std=c++20"),
    depends_on=lambda: f"{torch.version.cuda} {platform.machine()}",
    # cuBLASLt and the runtime are those that libtorch_cuda has loaded
    ldflags=("-Wl,--no-as-needed", "-lc10_cuda", "-ltorch_cuda"),
    include_folders=_folders_with_headers,
)
"""The operators in C++; proofs lie beside the built library."""
