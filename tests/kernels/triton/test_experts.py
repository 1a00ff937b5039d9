"""The sum over a token's experts: bit for bit one addition after the other."""

from __future__ import annotations

import math

import pytest
import torch
from triton_cases import DEVICE, draw, same

from bi_compile.kernels.triton.experts import sum_experts


@pytest.mark.parametrize(("tokens", "k", "width"), [(1, 1, 1), (3, 8, 65), (5, 6, 1500), (0, 2, 8)])
def test_the_sum_of_a_tokens_rows_is_in_their_order(tokens: int, k: int, width: int) -> None:
    for dtype in (torch.float32, torch.float16):  # Triton's interpreter cuts off digits on the way to bfloat16
        x = draw(tokens, k, width, dtype=dtype)
        total = torch.zeros(tokens, width, device=DEVICE)
        for i in range(k):
            total = total + x[:, i].float()
        out = torch.full((tokens, width), math.nan, dtype=dtype, device=DEVICE)
        sum_experts(x, out)
        assert same(out, total.to(dtype))
