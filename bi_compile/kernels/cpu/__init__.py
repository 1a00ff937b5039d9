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
- Attention: the two products and the sum of exp are those above; see `attention.cpp` and `paged_attention.cpp`.

Threads share out rows, columns, heads, never a sum; every result is the same with any number of them.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from bi_compile import ops

from ..build import Extension

_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


EXTENSION = Extension(
    "bi_compile_cpu",
    Path(__file__).parent,
    ("matmul.cpp", "attention.cpp", "paged_attention.cpp", "reduce.cpp", "norm.cpp", "order.cpp", "pointwise.cpp"),
    # -ffp-contract=off: only what the source calls fma is fused, in every instance of a template alike
    (
        "-O3", "-std=c++20", _NATIVE, "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-Wno-psabi", "-Wno-maybe-uninitialized",
    ),
    depends_on=_processor,
    ldflags=("-fopenmp",),
)  # fmt: skip
"""The operators in C++."""


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, *, counts: bool = False) -> Tensor:
    """See `bi_compile.ops.grouped_mm`: a product for each group."""
    out, start = ops.grouped_mm.meta(a, b, offs, bias).zero_(), 0
    for group, end in enumerate((offs.cumsum(0) if counts else offs).tolist()):
        rows = a[start:end]
        out[start:end] = ops.mm(rows, b[group]) if bias is None else ops.addmm(bias[group], rows, b[group])
        start = end
    return out


def register(library: torch.library.Library) -> None:
    """Give every operator its implementation for CPU tensors, compiling them if this machine has not done so yet.

    Raises:
        RuntimeError: there is no C++ compiler or no ninja, or the compiler failed.
    """
    EXTENSION.load()
    library.impl("grouped_mm", grouped_mm, "CPU")
