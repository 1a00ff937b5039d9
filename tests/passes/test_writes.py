"""Writes at indices: of several to one place the last stays, whatever the number of writes and threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import captured, rewrite_all, run, targets
from torch import Tensor

from bi_compile import invariant, ops

WIDE = 70_000


def last_wins(places: Tensor, size: int) -> Tensor:
    """[size]: the number of the last write to each place, by a loop; -1 where there is none."""
    found = [-1] * size
    for n, place in enumerate(places.tolist()):
        found[place] = n
    return torch.tensor(found, dtype=torch.float32)


def places(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(size, (n,), generator=torch.Generator().manual_seed(seed))


#: each writes n numbered values into 7 places: with the places and the values to a tensor [7] of -1
WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_put": lambda i, v: torch.full((7,), -1.0).index_put((i,), v),
    "setitem": lambda i, v: _set(torch.full((7,), -1.0), i, v),
    "setitem of a column": lambda i, v: _set_column(torch.full((7, 3), -1.0), i, v)[:, 1],
    "index_copy": lambda i, v: torch.full((7,), -1.0).index_copy(0, i, v),
    "index_copy_": lambda i, v: torch.full((7, 2), -1.0).index_copy_(0, i, v[:, None].expand(-1, 2))[:, 0],
    "put": lambda i, v: torch.full((7,), -1.0).put(i, v),
    "put_": lambda i, v: torch.full((7, 1), -1.0).put_(i - 7, v)[:, 0],
    "scatter": lambda i, v: torch.full((7,), -1.0).scatter(0, i, v),
    "scatter along columns": lambda i, v: torch.full((2, 7), -1.0).scatter(1, i.expand(2, -1), v.expand(2, -1))[1],
}


def _set(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    x[i - 7] = v  # counted from the end
    return x


def _set_column(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    x[i, 1] = v
    return x


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("n", [0, 1, 5, 1000, WIDE])
def test_the_last_write_stays(name: str, n: int) -> None:
    f, index, values = WRITES[name], places(n, 7), torch.arange(float(n))
    want = last_wins(index, 7)
    with invariant():
        assert torch.equal(f(index, values), want)
    gm = captured(f, index, values)
    rewrite_all(gm.graph)
    assert any(t.startswith("bi_compile.") for t in targets(gm.graph))
    assert torch.equal(run(gm, index, values)[0], want)


def test_what_inductor_makes_of_it() -> None:
    """70,000 writes into 7 places under two threads, all three forms in one program."""

    def f(i: Tensor, v: Tensor) -> list[Tensor]:
        return [WRITES[name](i, v) for name in ("index_put", "index_copy", "scatter", "setitem")]

    torch._dynamo.reset()
    index, values = places(WIDE, 7), torch.arange(float(WIDE))
    for got in torch.compile(f, backend="bi_ascend")(index, values):
        assert torch.equal(got, last_wins(index, 7))


def test_a_write_in_place_does_not_copy_the_whole() -> None:
    """A cache keeps its memory, and what is not written keeps its value."""
    cache = torch.arange(12.0).view(4, 3)
    before = cache.data_ptr()
    with invariant():
        cache[torch.tensor([2, 0, 2])] = torch.tensor([[1.0], [2.0], [3.0]])
        cache.index_copy_(0, torch.tensor([3, 3]), torch.tensor([[7.0] * 3, [8.0] * 3]))
    assert cache.data_ptr() == before
    assert torch.equal(cache[:, 0], torch.tensor([2.0, 3.0, 3.0, 8.0])) and cache[1].tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize("where", ["front", "apart", "mask", "two"])
def test_indices_of_every_form(where: str) -> None:
    """The meaning of indices is PyTorch's: None between them, masks, values that are broadcast."""
    x, a, b = torch.zeros(4, 5, 6), torch.tensor([1, 0, 3]), torch.tensor([[2], [4]])
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    indices, values = {
        "front": ((a,), torch.randn(3, 5, 6)),
        "apart": ((a, None, torch.tensor([5, 2, 2])), torch.randn(3, 5)),
        "mask": ((mask,), torch.tensor(2.0)),
        "two": ((a, b), torch.randn(2, 3, 1)),
    }[where]
    want = torch.ops.aten.index_put.default(x, indices, values)
    assert torch.equal(ops.index_put(x, indices, values), want)
    with invariant():
        assert torch.equal(torch.ops.aten.index_put.default(x, indices, values), want)


def test_sums_are_taken_in_the_order_of_the_indices() -> None:
    """Eager accumulate: each sum rounded in its turn, as a loop would; with one thread or two."""
    n = WIDE
    index = torch.arange(n) % 3500
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = torch.zeros(3500, dtype=torch.bfloat16)
    for turn in range(n // 3500):
        want += values[turn * 3500 : (turn + 1) * 3500]
    with invariant():
        assert torch.equal(torch.zeros(3500, dtype=torch.bfloat16).index_put((index,), values, accumulate=True), want)
