"""What the tests of the CPU kernels share: inputs, memory layouts, numbers of threads, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

Outputs = tuple[Tensor, ...]


def rand(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64).to(dtype)


def outputs(result: Any) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same(a: Any, b: Any) -> bool:
    """Equal as bits, but for the payload of NaN and the sign of zero."""
    return all(
        x.dtype == y.dtype
        and torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num(0, 9, -9), y.nan_to_num(0, 9, -9))
        for x, y in zip(outputs(a), outputs(b), strict=True)
    )


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    wide = x.new_zeros([*x.shape[:-1], 2 * x.shape[-1] + 1])
    wide[..., 1::2] = x
    shifted = x.new_zeros(x.numel() + 1)
    shifted[1:] = x.flatten()
    padded = x.new_zeros([*x.shape[:-1], x.shape[-1] + 3])
    padded[..., : x.shape[-1]] = x
    return {
        "strided": wide[..., 1::2],
        "unaligned": shifted[1:].view(x.shape),
        "padded": padded[..., : x.shape[-1]],
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
    }


def no_worse(name: str, got: Any, native: Any, exact: Any, dtype: torch.dtype) -> None:
    for g, n, e in zip(outputs(got), outputs(native), outputs(exact), strict=True):
        assert g.shape == n.shape == e.shape, name
        ours, theirs = ((t.double() - e).abs().mean().item() for t in (g, n))
        # float64 has no wider reference: a few roundings of the result's size
        slack = e.abs().mean().item() * torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 1e-3)
        assert ours <= 1.05 * theirs + slack, (name, ours, theirs)
