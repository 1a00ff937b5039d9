"""Every pointwise operator of ATen under the eager fallback: a row's bits at several widths, batches, places and layouts."""

from __future__ import annotations

import pytest
import torch

from bi_compile import invariant
from bi_compile.measure import pointwise
from bi_compile.measure.pointwise import Pointwise

#: short, odd, and more than one vector; the whole of 1 to 40, and 70,000, is measured by hand
WIDTHS = (3, 10, 21)
BATCHES = (1, 2, 7, 16)
OPERATORS = pointwise.operators()


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.float32, 150), (torch.bfloat16, 150), (torch.int32, 120)],
    ids=str,
)
def test_no_row_follows_its_neighbours(dtype: torch.dtype, least: int) -> None:
    with invariant():
        found = {p.name: pointwise.eager(p, dtype, WIDTHS, BATCHES) for p in OPERATORS}
    assert not {name: where for name, where in found.items() if where and not where.startswith("refused")}
    assert sum(where is None for where in found.values()) > least


@pytest.mark.parametrize("name", ["aten.silu.default", "aten.logit.default", "aten.softshrink.default"])
def test_pytorch_alone_follows_them(name: str) -> None:
    """What the measurement is worth: without the fallback it finds these."""
    (p,) = [p for p in OPERATORS if p.name == name]
    assert pointwise.eager(p, torch.float32)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_the_sign_of_zero_does_not_follow_the_place(name: str) -> None:
    op = Pointwise(getattr(torch.ops.aten, name).default, 2)
    zeros = torch.tensor([0.0, -0.0]).repeat(20)[:35]
    with invariant():
        alone = op(zeros[None], -zeros[None])
        for n in (2, 7, 33):
            among = op(zeros.expand(n, -1), -zeros.expand(n, -1))
            assert all(pointwise.same_bits(row[None], alone) for row in among)
