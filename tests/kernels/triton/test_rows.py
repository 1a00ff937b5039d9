"""Every operator over rows: a row's bits are its own, and as exact as PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_cases import (
    CUDA,
    DEVICE,
    FLOATS,
    ROUNDED,
    ROW_CALLS,
    THEIRS,
    Outputs,
    call,
    cuda,
    draw,
    no_worse,
    outputs,
    root_mean_square,
    same,
)

ROWS = (1, 2, 3, 17, 33)

LENGTHS = (1, 7, 128, 1000, 4096, 8191, 151936) if CUDA else (1, 65, 4099)

LONG = {name for name in ROW_CALLS if name not in ("mm", "addmm", "bmm", "baddbmm")}


def lengths(name: str) -> tuple[int, ...]:
    if name == "cumsum":
        return tuple(n for n in LENGTHS if n < (9000 if CUDA else 100))
    if not CUDA and name not in ("sum", "softmax", "rms_norm", "layer_norm"):  # the others walk along rows as these do
        return tuple(n for n in LENGTHS if n < 100)
    return LENGTHS if name in LONG else tuple(n for n in LENGTHS if n < 1000) + ((1000,) if CUDA else ())


CASES = [(name, length) for name in ROW_CALLS for length in lengths(name)]


@pytest.mark.parametrize("dtype", FLOATS if CUDA else (torch.float32,), ids=str)
@pytest.mark.parametrize(("name", "length"), CASES)
def test_a_row_keeps_its_bits_among_others(name: str, length: int, dtype: torch.dtype) -> None:
    run = ROW_CALLS[name]
    x = draw(max(ROWS), length, dtype=dtype)
    alone = [run(x[i : i + 1]) for i in (0, 5)]
    for rows in ROWS:
        for i, expected in zip((0, 5), alone, strict=True):
            for place in {0, rows // 2, rows - 1} if CUDA else {rows - 1 - i * rows // 10}:
                batch = torch.roll(x, place - i, 0)[:rows]
                assert same(tuple(o[place : place + 1] for o in outputs(run(batch))), expected), (rows, place)


@pytest.mark.parametrize("dtype", FLOATS if CUDA else (torch.float32,), ids=str)
@pytest.mark.parametrize(("name", "length"), CASES)
def test_the_memory_layout_does_not_matter(name: str, length: int, dtype: torch.dtype) -> None:
    run = ROW_CALLS[name]
    x = draw(5, length, dtype=dtype)
    expected = run(x)
    transposed = x.t().contiguous().t()
    unaligned = torch.empty(5 * length + 1, dtype=dtype, device=DEVICE)[1:].view(5, length).copy_(x)
    apart = torch.empty(5, length + 16, dtype=dtype, device=DEVICE)[:, :length].copy_(x)
    odd = torch.empty(5, length + 3, dtype=dtype, device=DEVICE)[:, 1 : length + 1].copy_(x)
    every_other = torch.empty(10, length, dtype=dtype, device=DEVICE)[::2].copy_(x)
    for other in (transposed, unaligned, apart, odd, every_other):
        assert same(run(other), expected), other.stride()
    for i in range(2):
        lone = tuple(o[i : i + 1].expand(4, *o.shape[1:]) for o in outputs(expected))
        assert same(run(x[i].expand(4, -1)), lone)
        assert same(run(odd[i : i + 1]), tuple(o[:1] for o in lone))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ROW_CALLS)
def test_bad_neighbours_stay_where_they_are(name: str, bad: float) -> None:
    x = draw(7, 65)
    x[2] = -0.0
    expected = tuple(o[1:6] for o in outputs(ROW_CALLS[name](x)))
    x[0] = bad
    x[6, 3] = bad
    assert same(tuple(o[1:6] for o in outputs(ROW_CALLS[name](x))), expected)


@pytest.mark.parametrize("dtype", [t for t in ROUNDED if t != torch.float64], ids=str)
@pytest.mark.parametrize("length", [128, 1000, 8191] if CUDA else [129])
@pytest.mark.parametrize("name", THEIRS)
def test_no_less_exact_than_pytorch(name: str, length: int, dtype: torch.dtype) -> None:
    x = draw(256, length, dtype=dtype)
    ours, theirs, exact = outputs(ROW_CALLS[name](x))[0], THEIRS[name](x), THEIRS[name](x.double())
    # cuBLAS adds up a float32 product in several chains
    room = 0.5 * torch.finfo(torch.float32).eps * root_mean_square(exact) if CUDA else 0.0
    no_worse(ours.reshape(theirs.shape), theirs, exact, room)


@cuda
def test_compiled_eager_and_in_a_graph() -> None:
    w, norm = draw(1024, 1024, dtype=torch.bfloat16, scale=0.03), draw(1024, dtype=torch.bfloat16)

    def step(x: Tensor) -> Outputs:
        y, _, s = call("add_rms_norm", call("mm", x, w.t()), x, norm, 1e-6)
        return call("softmax", y, -1), s

    compiled = torch.compile(step, dynamic=True)
    every = step(draw(64, 1024, dtype=torch.bfloat16))
    for rows in (64, 1, 17):
        x = draw(64, 1024, dtype=torch.bfloat16)[:rows].contiguous()
        expected = step(x)
        assert same(expected, tuple(o[:rows] for o in every))
        assert same(compiled(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(x)
        graph.replay()
        assert same(captured, expected)
