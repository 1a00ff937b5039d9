"""vLLM's int8 products on a CPU, which `targets/cpu.py` trusts: rows alone and among others. An engine: test_odd_engines.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.platforms import current_platform

ROWS = 70
current_platform.import_kernels()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(512, 256), (136, 200)])
def test_a_row_of_vllms_int8_product_is_the_same_in_every_batch(
    n: int, k: int, dtype: torch.dtype, dynamic: bool, symmetric: bool
) -> None:
    torch.manual_seed(0)
    weight, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n, 1) * 0.01
    x, bias = torch.randn(ROWS, k).to(dtype), torch.randn(n).to(dtype)
    x[9], x[5] = 0, x[5] * 1e4
    handler = _custom_ops.create_onednn_scaled_mm(weight.t(), scales, dtype, dynamic, not symmetric, 32)
    scale = None if dynamic else torch.tensor([0.03])
    point = None if dynamic or symmetric else torch.tensor([3], dtype=torch.int32)
    correction = (
        (weight.t().sum(0, keepdim=True, dtype=torch.float32) * scales.squeeze())
        if not (symmetric and not dynamic)
        else None
    )

    def run(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        given = x[rows].clone()
        q, s, z = _custom_ops.onednn_scaled_int8_quant(given, scale, point, symmetric)
        out = torch.full((given.shape[0], n), torch.nan, dtype=dtype)
        _custom_ops.onednn_scaled_mm(handler, q, out, s, z, None if symmetric else correction, bias)
        return out, q, s.expand(given.shape[0], 1) if dynamic else s

    together, q, s = run(slice(None))
    assert not together.isnan().any() and together[5].abs().max() > together[6].abs().max()
    for size in (1, 2, 7, 17, 33, 64):
        for start in range(0, ROWS - size + 1, 7 if size == 1 else ROWS - size):
            rows = slice(start, start + size)
            for got, want in zip(run(rows), (together[rows], q[rows], s[rows] if dynamic else s), strict=True):
                assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)), (
                    size,
                    start,
                )
