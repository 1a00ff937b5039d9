"""tanh has the bits of the code that Inductor generates, and an element's are the same at every place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bi_compile import ops

SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 1e-3, 9.0, -9.5, 88.0, math.inf, -math.inf, math.nan]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def values(n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(n)) * 3
    x[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)[:n]
    return x


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)


@DTYPES
def test_an_elements_place_does_not_matter(dtype: torch.dtype) -> None:
    x = values(70_001, dtype)
    whole = ops.tanh(x)
    for start, end in ((0, 1), (1, 2), (3, 20), (5, 22), (8, 1000), (60_000, 70_001), (0, 0)):
        assert torch.equal(bits(ops.tanh(x[start:end])), bits(whole[start:end])), (start, end)
    square = x[: 63 * 63].view(63, 63)
    assert torch.equal(bits(ops.tanh(square.t())), bits(ops.tanh(square).t()))
    assert torch.equal(bits(ops.tanh(x[::7])), bits(whole[::7]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(bits(ops.tanh(x)), bits(whole))
    finally:
        torch.set_num_threads(threads)


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (7, 33), (64, 100)], ids=str)
def test_eager_code_has_the_bits_of_a_graph(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    import bi_compile

    def soft_cap(x: Tensor) -> Tensor:
        return torch.tanh(x / 30.0) * 30.0

    x = values(math.prod(shape), dtype).view(shape) * 10
    with bi_compile.invariant():
        eager = soft_cap(x)
    torch._dynamo.reset()
    assert torch.equal(bits(torch.compile(soft_cap, backend="bi_ascend")(x)), bits(eager))


def test_it_is_right() -> None:
    x = values(1000, torch.float64)[len(SPECIAL) :]
    assert torch.allclose(ops.tanh(x), torch.tanh(x), rtol=1e-15, atol=0)
    assert torch.allclose(ops.tanh(x.float()).double(), torch.tanh(x), rtol=3e-7, atol=0)
    got = ops.tanh(torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]))
    assert got[:4].tolist() == [0.0, 0.0, 1.0, -1.0] and math.isnan(got[4]) and torch.signbit(got[1])


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="bi_compile::tanh has no kernel for BFloat16"):
        ops.tanh(torch.zeros(3, dtype=torch.bfloat16))
