"""Every pointwise operator of ATen under the eager fallback: a row's bits at several widths, batches, places and layouts."""

from __future__ import annotations

import contextlib

import cpu_cases
import pytest
import torch
from torch import Tensor

from bi_compile import invariant
from bi_compile.measure import pointwise

#: short, odd, and more than one vector; the whole of 1 to 40, and 70,000, is measured by hand
WIDTHS = (3, 10, 21)
BATCHES = (1, 2, 7, 16)
OPERATORS = pointwise.operators()


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.float32, 150), (torch.bfloat16, 150), (torch.int32, 120), (torch.complex64, 60)],
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


def _of_threads(threads: int, dtype: torch.dtype) -> set[str]:
    """The operators of which a row of 1,000 has other bits among so many others that `threads` share them."""
    found = set()
    with cpu_cases.threads(threads):
        for p in OPERATORS:
            alone = [pointwise.values(1, 1000, dtype, i + 1) for i in range(p.tensors)]
            with contextlib.suppress(NotImplementedError):  # not for every dtype
                want = p(*alone)
                for rows in (17, 33, 67):
                    got = p(*[x.expand(rows, 1000).contiguous() for x in alone])
                    pairs = zip(pointwise._outputs(got), pointwise._outputs(want), strict=True)
                    if not all(pointwise.same_bits(g, w.expand(rows, *w.shape[1:])) for g, w in pairs):
                        found.add(p.name)
    return found


@pytest.mark.parametrize("threads", [1, 3, 4, 7])
def test_no_row_follows_how_threads_share_the_work(threads: int) -> None:
    with invariant():
        assert not _of_threads(threads, torch.float32) | _of_threads(threads, torch.bfloat16)


def test_pytorch_alone_follows_how_threads_share_the_work() -> None:
    assert "aten.gelu.default" in _of_threads(3, torch.float32)


OF_COMPLEX = ("mul.Tensor", "square.default", "addcmul.default", "lerp.Scalar", "lerp.Tensor", "silu_backward.default")


@pytest.mark.parametrize(("backend", "equal"), [("aot_eager", False), ("bi_ascend", True)])
def test_products_of_complex_numbers_in_a_graph(backend: str, equal: bool) -> None:
    """Inductor calls PyTorch's kernels for them, as a graph that no compiler lowers does."""
    points = [p for p in OPERATORS if p.name.removeprefix("aten.") in OF_COMPLEX]
    torch._dynamo.reset()
    options = {"options": {"inner": "eager"}} if backend == "bi_ascend" else {}
    run = torch.compile(pointwise.in_one_graph(points), backend=backend, dynamic=True, **options)
    rows = [
        [y[at] for y in run(*operands)]
        for _, at, _, operands in pointwise.everywhere(points, 10, torch.complex64, BATCHES)
    ]
    assert all(pointwise.same_bits(a, b) for row in rows[1:] for a, b in zip(row, rows[0], strict=True)) is equal


@pytest.mark.parametrize(
    "name", ["maximum.default", "minimum.default", "clamp_min.Tensor", "clamp_max.Tensor", "relu.default"]
)
def test_the_sign_of_zero_does_not_follow_the_place(name: str) -> None:
    """Where the larger of 0.0 and -0.0 is asked for; more than one thread shares the longest rows."""
    packet, overload = name.split(".")
    op = getattr(getattr(torch.ops.aten, packet), overload)
    for width, batches in ((35, (2, 7, 33)), (pointwise.WIDE + 1, (1, 3))):
        zeros = torch.tensor([0.0, -0.0]).repeat(width)[:width]
        with invariant():
            alone = _of(op, zeros[None])
            assert pointwise.same_bits(alone[0, :2], alone[0, -3:-1]), "at the end of the row as at its start"
            for n in batches:
                assert all(pointwise.same_bits(row[None], alone) for row in _of(op, zeros.expand(n, -1).contiguous()))


def _of(op: torch._ops.OpOverload, zeros: Tensor) -> Tensor:
    return op(zeros) if len(op._schema.arguments) == 1 else op(zeros, -zeros)
