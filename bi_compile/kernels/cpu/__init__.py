"""The operators on a CPU, compiled from C++ at the first call on the machine that they run on.

The order of the sums, which depends on the reduced length and the dtype alone:

- Products: K in blocks of 1024, ascending; in a block 16 partial sums in float32, lane j taking the elements
  k = j mod 16 in ascending order, each one fused multiply-add, then the tree of adjacent pairs over the lanes. float16
  is widened; so is bfloat16, except where the processor has a dot product for it (AVX512_BF16): there lane j takes the
  pairs k = 2j, 2j+1 mod 32. With AMX, if the system permits it, bfloat16 takes K in steps of 32, each two partial sums, of
  the even and the odd k (`amx.h`). float64: 8 lanes of doubles. A missing end of K counts as zeros, which change nothing.
- Reductions and statistics of float32, bfloat16 and float16: 16 partial sums in double, lane j taking the elements
  c = j mod 16, and the same tree. float64: blocks of 1024 in 8 such lanes, added by recursive halving.
- cumsum: one after another, in double, each result rounded once.
- Attention: the two products and the sum of exp are those above; see `attention.cpp`.

Threads share out rows, columns, heads, never a sum; every result is the same with any number of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from bi_compile import ops

_HERE = Path(__file__).parent
_SOURCES = [_HERE / name for name in ("matmul.cpp", "attention.cpp", "reduce.cpp", "norm.cpp")]
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
#: -ffp-contract=off: only what the source calls fma is fused, in every instance of a template alike
_FLAGS = [
    "-O3",
    "-std=c++20",
    _NATIVE,
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fopenmp",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _name() -> str:
    """The library's name, different for each source, setting, torch and processor: an older build is never loaded."""
    digest = hashlib.sha256()
    for path in sorted([*_SOURCES, *_HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    for text in (*_FLAGS, torch.__version__, platform.python_version(), _processor()):
        digest.update(text.encode())
    return f"bi_compile_cpu_{digest.hexdigest()[:16]}"


def _require_tools() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    remedies = {compiler: "install g++ 12 or newer, or name a C++20 compiler in CXX", "ninja": "pip install ninja"}
    for tool, remedy in remedies.items():
        if shutil.which(tool) is None:
            raise RuntimeError(f"bi_compile compiles its CPU kernels, and {tool!r} is not on the PATH: {remedy}")


def _compile(name: str, folder: Path) -> None:
    from torch.utils import cpp_extension  # here: it takes a second to import, and a finished build needs none of it

    path = os.environ.get("PATH", "")
    # the ninja of a virtual environment that was not activated
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        _require_tools()
        cpp_extension.load(
            name,
            [str(source) for source in _SOURCES],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = path


def _load() -> None:
    """Load the C++ operators. The first process compiles them, the others wait; later ones find the build."""
    name = _name()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(root) / name
    finished = folder / "finished"
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "flock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, unlike torch's own lock file, which
            (folder / "lock").unlink(missing_ok=True)  # would make everyone wait for a process that was killed
            if not finished.exists():
                _compile(name, folder)
                finished.touch()
                return
    torch.ops.load_library(str(folder / f"{name}.so"))


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `bi_compile.ops.grouped_mm`: a product for each group."""
    out, start = ops.grouped_mm.meta(a, b, offs, bias).zero_(), 0
    for group, end in enumerate(offs.tolist()):
        rows = a[start:end]
        out[start:end] = ops.mm(rows, b[group]) if bias is None else ops.addmm(bias[group], rows, b[group])
        start = end
    return out


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.paged_attention`: `scaled_dot_product_attention` for each request."""
    out, lse = ops.paged_attention.meta(query, key, value, lengths, block_table, scale=scale, left=left, right=right)
    out.zero_()
    lse.fill_(-torch.inf)
    start = first = 0
    for i, (end, keys) in enumerate(lengths.t().tolist()):
        if block_table is None:
            k, v = key[first:keys], value[first:keys]
            keys, first = keys - first, keys
        else:
            pages = block_table[i, : -(-keys // key.shape[1])].long()
            k, v = key[pages].flatten(0, 1)[:keys], value[pages].flatten(0, 1)[:keys]
        if end > start and keys:
            distance = torch.arange(keys)[None] - torch.arange(keys - (end - start), keys)[:, None]
            seen = (distance >= (-keys if left is None else -left)) & (distance <= (keys if right is None else right))
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[start:end], k, v))
            y, z = ops.scaled_dot_product_attention(q, k, v, seen, scale=scale)
            out[start:end], lse[start:end] = y[0].transpose(0, 1), z[0].t()
        start = end
    return out, lse


def register(library: torch.library.Library) -> None:
    """Give every operator its implementation for CPU tensors, compiling them if this machine has not done so yet.

    Raises:
        RuntimeError: there is no C++ compiler or no ninja, or the compiler failed.
    """
    _load()
    library.impl("grouped_mm", grouped_mm, "CPU")
    library.impl("paged_attention", paged_attention, "CPU")
