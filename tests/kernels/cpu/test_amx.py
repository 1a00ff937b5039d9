"""bfloat16 products on a CPU, where AMX tiles end; the same holds without AMX."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bi_compile import ops


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 95, 1056])
def test_bfloat16_products_at_the_edges_of_tiles(k: int) -> None:
    """Of 16 rows, 16 columns and 32 elements of K, whatever lies behind them."""

    def framed(rows: int, columns: int) -> Tensor:
        frame = torch.full((rows + 1, columns + 3), float("nan"), dtype=torch.bfloat16)
        return frame[:rows, :columns].copy_(torch.randn(rows, columns))

    for n in (1, 15, 16, 17, 32, 33, 47):
        w = framed(n, k)
        transposed = framed(k, n).copy_(w.t())
        for m in (1, 2, 15, 16, 17, 31, 32, 33, *((129, 4097) if n == 33 else ())):
            a = framed(m, k)
            out = ops.mm(a, w.t())
            assert torch.equal(out, ops.mm(a, transposed)), (m, n)
            assert torch.equal(ops.bmm(a.expand(3, m, k), w.t().expand(3, k, n)), out.expand(3, m, n)), (m, n)
            for i in {0, m // 2, m - 1}:
                assert torch.equal(ops.mm(a[i : i + 1], w.t()), out[i : i + 1]), (m, n, i)
            exact = a.double() @ w.t().double()
            # half a unit of bfloat16 for the result, and float32's error in the sum of the magnitudes
            room = exact.abs() * 2**-8 + (a.double().abs() @ w.t().double().abs()) * 2**-20
            assert ((out.double() - exact).abs() <= room).all(), (m, n)
