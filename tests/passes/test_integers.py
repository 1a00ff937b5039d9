"""Integers: left alone where every order gives the same, replaced where they are summed as floats."""

from __future__ import annotations

import pytest
import torch
from support import Call, close, graph_of, rand, rewrite_all, run, targets

aten = torch.ops.aten
INTEGERS = rand(4, 6, dtype=torch.int64)
EXACT: list[Call] = [
    (aten.sum.default, (INTEGERS,), {}),
    (aten.sum.dim_IntList, (INTEGERS, [1]), {}),
    (aten.sum.dim_IntList, (INTEGERS > 0, None), {}),
    (aten.nansum.default, (INTEGERS, [0]), {}),
    (aten.cumsum.default, (INTEGERS, 0), {}),
    (aten.mm.default, (INTEGERS, INTEGERS.t()), {}),
    (aten.addmm.default, (INTEGERS[:, :4], INTEGERS, INTEGERS.t()), {}),
    (aten.bmm.default, (INTEGERS[None], INTEGERS.t()[None]), {}),
    (aten.mv.default, (INTEGERS, INTEGERS[0]), {}),
    (aten.dot.default, (INTEGERS[0], INTEGERS[1]), {}),
    (aten.matmul.default, (INTEGERS, INTEGERS.t()), {}),
]


@pytest.mark.parametrize("call", EXACT, ids=lambda c: str(c[0]))
def test_integers_stay(call: Call) -> None:
    """Integers add up exactly in every order: the operator is left."""
    gm, _, _ = graph_of(call)
    assert rewrite_all(gm.graph) == [] and targets(gm.graph) == [str(call[0])]


SUMMED: list[Call] = [
    (aten.sum.default, (INTEGERS,), {"dtype": torch.float32}),
    (aten.sum.dim_IntList, (INTEGERS, [1], True), {"dtype": torch.float64}),
    (aten.sum.dim_IntList, (INTEGERS > 0, [-1]), {"dtype": torch.bfloat16}),
    (aten.nansum.default, (INTEGERS, [0]), {"dtype": torch.float32}),
    (aten.mean.default, (INTEGERS,), {"dtype": torch.float32}),
    (aten.mean.dim, (INTEGERS, [0]), {"dtype": torch.float64}),
    (aten.cumsum.default, (INTEGERS, 1), {"dtype": torch.float32}),
    (aten.logsumexp.default, (INTEGERS, [1]), {}),
]


@pytest.mark.parametrize("call", SUMMED, ids=lambda c: str(c[0]))
def test_integers_that_are_summed_as_floats_are_replaced(call: Call) -> None:
    gm, inputs, _ = graph_of(call)
    assert len(rewrite_all(gm.graph)) == 1
    close(run(gm, *inputs), [call[0](*call[1], **call[2])])
