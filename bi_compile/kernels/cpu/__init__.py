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
    ("matmul.cpp", "attention.cpp", "reduce.cpp", "norm.cpp"),
    # -ffp-contract=off: only what the source calls fma is fused, in every instance of a template alike
    (
        "-O3", "-std=c++20", _NATIVE, "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-Wno-psabi", "-Wno-maybe-uninitialized",
    ),
    depends_on=_processor,
    ldflags=("-fopenmp",),
)  # fmt: skip
"""The operators in C++."""


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
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `bi_compile.ops.paged_attention`: `scaled_dot_product_attention` for each request."""
    out, lse = ops.paged_attention.meta(
        query,
        key,
        value,
        lengths,
        block_table,
        query_rope=query_rope,
        key_rope=key_rope,
        scale=scale,
        left=left,
        right=right,
    )
    if query_rope is not None and key_rope is not None:
        query, key = torch.cat([query, query_rope], -1), torch.cat([key, key_rope], -1)
    out.zero_()
    lse.fill_(-torch.inf)
    start = first = 0
    for i, (end, keys) in enumerate(lengths.t().tolist()):
        if block_table is None:
            k, v = key[first:keys], value[first:keys]
            keys, first = keys - first, keys
        else:
            pages = block_table[i, : -(-keys // key.shape[1])].long()
            if keys and not 0 <= int(pages.min()) <= int(pages.max()) < key.shape[0]:
                wrong = int(pages.max()) if int(pages.min()) >= 0 else int(pages.min())
                raise IndexError(
                    f"bi_compile::paged_attention: block_table names page {wrong}, and the cache has {key.shape[0]}"
                )
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
    EXTENSION.load()
    library.impl("grouped_mm", grouped_mm, "CPU")
    library.impl("paged_attention", paged_attention, "CPU")
