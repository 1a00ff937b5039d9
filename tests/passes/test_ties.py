"""Sorts and selections: of equal elements the lowest index first, whatever k, batch, place and way in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import captured, results, rewrite_all, run, table
from torch import Tensor

from bi_compile import invariant, ops
from bi_compile.measure.pointwise import same_bits

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


def tied(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Few values, so that nearly all are tied; with zeros of both signs, and NaN where there is any."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, width), generator=g).double()
    if dtype.is_floating_point:
        x = torch.where(torch.rand(x.shape, generator=g) < 0.1, -0.0, x)
        x = torch.where(torch.rand(x.shape, generator=g) < 0.05, torch.nan, x)
    return x.to(dtype)


def by_rule(row: Tensor, largest: bool) -> list[int]:
    """The indices of one row in the order that the module names, by Python's own stable sort."""
    numbers = [(True, 0.0) if v != v else (False, v + 0.0) for v in row.tolist()]
    return sorted(range(len(numbers)), key=lambda i: numbers[i], reverse=False) if not largest else _down(numbers)


def _down(numbers: list[tuple[bool, float]]) -> list[int]:
    return sorted(range(len(numbers)), key=lambda i: (not numbers[i][0], -numbers[i][1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 17, 300])
def test_topk_and_sort_follow_the_rule(dtype: torch.dtype, width: int) -> None:
    x = tied(5, width, dtype)
    with invariant():
        for largest, k in itertools.product((True, False), sorted({0, 1, width // 2, width})):
            want = torch.tensor([by_rule(row, largest)[:k] for row in x], dtype=torch.int64).view(5, k)
            values, indices = x.topk(k, largest=largest)
            assert torch.equal(indices, want) and same_bits(values, x.gather(1, want))
            across, places = x.t().topk(k, dim=0, largest=largest, sorted=False)
            assert torch.equal(places.t(), want) and same_bits(across.t(), x.gather(1, want))
        for descending in (True, False):
            want = torch.tensor([by_rule(row, descending) for row in x])
            for got in (x.sort(descending=descending), x.sort(stable=False, descending=descending)):
                assert torch.equal(got.indices, want)
            assert torch.equal(x.argsort(descending=descending), want)


def test_native_topk_does_not_follow_it() -> None:
    """What the pass is for: the first 3 of 20 are not the 3 largest of a row with ties."""
    x = tied(30, 1000, torch.bfloat16)
    assert not torch.equal(x.topk(3)[1], x.topk(20)[1][:, :3])
    with invariant():
        assert torch.equal(x.topk(3)[1], x.topk(20)[1][:, :3])


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "kthvalue": lambda x: x.kthvalue(2, dim=1, keepdim=True),
    "median": lambda x: x.median(1),
    "nanmedian": lambda x: x.nanmedian(1),
    "mode": lambda x: x.mode(1),
    "max": lambda x: x.max(1),
    "min": lambda x: x.min(1, keepdim=True),
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(1),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1, keepdim=True),
    "aminmax": lambda x: x.aminmax(dim=1),
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(),
}


def leaves(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def plain(x: Tensor) -> Tensor:
    """Without what a sign of zero or a NaN would hide in a comparison of values."""
    return x.nan_to_num(9.0) + 0 if x.is_floating_point() else x


@pytest.mark.parametrize("name", OTHERS)
def test_the_values_are_the_operators(name: str) -> None:
    """Against PyTorch on rows without ties, and on rows with ties as far as values go; indices point at them."""
    f = OTHERS[name]
    distinct = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(i)) for i in range(4)]).float()
    for x, ties in ((distinct, False), (tied(6, 31, torch.float32), True), (tied(6, 31, torch.bfloat16, 1), True)):
        x = x.nan_to_num(1.0) if name == "mode" else x
        want = leaves(f(x))
        with invariant():
            got = leaves(f(x))
        gm = captured(f, x)
        rewrite_all(gm.graph)
        for other in (got, leaves(run(gm, x))):
            assert len(other) == len(want)
            for g, w in zip(other, want, strict=True):
                assert g.dtype == w.dtype and g.shape == w.shape
                if g.is_floating_point() or not ties:
                    assert torch.equal(plain(g), plain(w)), name
            if len(other) == 2 and name != "aminmax":
                value, index = (t if t.dim() == 2 else t[:, None] for t in other)
                assert same_bits(x.gather(1, index), value)


def test_the_mode_counts_rows_with_nan_too() -> None:
    """PyTorch's own is wrong there: NaN upsets its sort."""
    row = torch.tensor([[2.0, torch.nan, 0.0, 2.0, 0.0, 2.0]])
    with invariant():
        assert row.mode(1).values.item() == 2.0


def test_the_median_of_a_row_with_nan_is_its_first_nan() -> None:
    x = torch.tensor([[3.0, torch.nan, 1.0, torch.nan], [2.0, 2.0, 2.0, 5.0]])
    with invariant():
        assert x.median(1).indices.tolist() == [1, 1]
        assert x.mode(1).indices[1] == 2


@pytest.mark.parametrize("f", [torch.amax, torch.amin], ids=["amax", "amin"])
def test_a_maximum_has_one_zero(f: Callable[..., Tensor]) -> None:
    """Wherever the zeros stand, whoever meets which first: 0.0."""
    sign = -1 if f is torch.amax else 1
    for width in (2, 17, 70_000):
        x = torch.full((3, width), float(sign))
        for at in (0, width // 2, width - 1):
            row = x.clone()
            row[:, at], row[:, (at + 1) % width] = -0.0, 0.0
            with invariant():
                assert same_bits(f(row, 1), torch.zeros(3))
    assert same_bits(ops.amax(torch.tensor([[-0.0, -1.0]]), [1]), torch.zeros(1))


def test_the_table_names_every_overload() -> None:
    by = table(target="cpu_eager")
    for op in (aten.topk.values, aten.sort.values, aten.sort.values_stable, aten.kthvalue.values, aten.mode.values):
        assert by.get(op) is not None


def test_shapes_stay_symbolic() -> None:
    gm = captured(lambda x: (*x.topk(3), *x.sort(), *x.median(1)), tied(7, 9, torch.float32), dynamic=True)
    before = [str(v.shape) for v in results(gm.graph)]
    rewrite_all(gm.graph)
    assert [str(v.shape) for v in results(gm.graph)] == before


def programs() -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    yield from OTHERS.items()


def test_compiled_rows_do_not_follow_the_batch() -> None:
    """One program of all of them: ties at every place of batches of several sizes, and argmax as Inductor writes it."""

    def f(x: Tensor) -> list[Tensor]:
        return [leaf for _, g in programs() for leaf in leaves(g(x))]

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="bi_ascend", dynamic=True)
    row = tied(1, 45, torch.bfloat16, 5)
    want = [t[0] for t in f(row)]
    with invariant():
        want = [t[0] for t in f(row)]
    for n in (1, 2, 33):
        for at in sorted({0, n // 2, n - 1}):
            x = tied(n, 45, torch.bfloat16, n)
            x[at] = row[0]
            got = compiled(x)
            assert all(same_bits(t[at], w) for t, w in zip(got, want, strict=True)), (n, at)
