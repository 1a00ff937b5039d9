"""The Triton kernels: a row's bits are its own, the results as exact as PyTorch's, for every tile in the tables.

On a machine with CUDA the tests call the operators there, elsewhere Triton's interpreter on CPU tensors. `test_triton`
runs this file in a process of its own, so that no other test module meets an interpreted Triton.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
ROWS = (1, 2, 3, 17, 33)
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES, torch.float64)
#: the interpreter cuts off digits on the way to bfloat16 where a GPU rounds
ROUNDED = FLOATS if CUDA else (torch.float32, torch.float16, torch.float64)
LENGTHS = (1, 7, 128, 1000, 4096, 8191, 151936) if CUDA else (1, 65, 4099)
Outputs = tuple[Tensor, ...]


if INTERPRETED and not CUDA:
    import interpreter

    interpreter.install()


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """The operator `name` on CUDA, the function that would compute it in the interpreter."""
    from bi_compile import ops
    from bi_compile.kernels.triton import IMPLEMENTATIONS

    return (getattr(ops, name) if CUDA else IMPLEMENTATIONS[name])(*args, **kwargs)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers of several magnitudes: sums of them round differently in almost every order."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.exp(torch.randn(shape, generator=generator, dtype=torch.float64)) * scale).to(dtype).to(DEVICE)


def outputs(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same(a: Tensor | Outputs, b: Tensor | Outputs) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return all(
        x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in zip(outputs(a), outputs(b), strict=True)
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def weight(x: Tensor, seed: int) -> Tensor:
    return parameter(x, x.shape[-1], seed=seed)


def matrix(x: Tensor, columns: int = 40) -> Tensor:
    return parameter(x, columns, x.shape[-1], seed=3).t()


def parameter(x: Tensor, *shape: int, seed: int) -> Tensor:
    """Numbers of bfloat16, so that they are the same in each dtype."""
    return draw(*shape, dtype=torch.bfloat16, seed=seed).to(x.dtype)


#: operator -> a call whose outputs all have x's rows as dimension 0
ROW_CALLS: dict[str, Callable[[Tensor], Tensor | Outputs]] = {
    "mm": lambda x: call("mm", x, matrix(x)),
    "addmm": lambda x: call("addmm", draw(40, dtype=x.dtype)[None], x, matrix(x), beta=0.3, alpha=1.7),
    "bmm": lambda x: call("bmm", x.expand(3, *x.shape), matrix(x).expand(3, -1, -1)).transpose(0, 1),
    "baddbmm": lambda x: call(
        "baddbmm", draw(1, 1, 40, dtype=x.dtype), x[None], matrix(x)[None], beta=0.3, alpha=1.7
    ).transpose(0, 1),
    "sum": lambda x: call("sum", x, [1]),
    "mean": lambda x: call("mean", x, [-1], True),
    "var_mean": lambda x: call("var_mean", x, [1]),
    "logsumexp": lambda x: call("logsumexp", x, [1]),
    "softmax": lambda x: call("softmax", x, 1),
    "log_softmax": lambda x: call("log_softmax", x, -1),
    "cumsum": lambda x: call("cumsum", x, 1),
    "rms_norm": lambda x: call("rms_norm", x, weight(x, 1), 1e-6),
    "add_rms_norm": lambda x: call("add_rms_norm", x, x.flip(1), weight(x, 1), 1e-6),
    "layer_norm": lambda x: call("layer_norm", x, weight(x, 1), weight(x, 2), 1e-5),
    "group_norm": lambda x: call("group_norm", x[:, :, None].expand(-1, -1, 2), weight(x, 1), weight(x, 2), 1, 1e-5),
}  # fmt: skip
LONG = {name for name in ROW_CALLS if name not in ("mm", "addmm", "bmm", "baddbmm")}


def lengths(name: str) -> tuple[int, ...]:
    if name == "cumsum":
        return tuple(n for n in LENGTHS if n < (9000 if CUDA else 100))
    if not CUDA and name not in ("sum", "softmax", "rms_norm", "layer_norm"):  # the others walk along rows as these do
        return tuple(n for n in LENGTHS if n < 100)
    return LENGTHS if name in LONG else tuple(n for n in LENGTHS if n < 1000) + ((1000,) if CUDA else ())


CASES = [(name, length) for name in ROW_CALLS for length in lengths(name)]


@pytest.mark.parametrize("dtype", FLOATS if CUDA else (torch.float32,))
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


@pytest.mark.parametrize("dtype", FLOATS if CUDA else (torch.float32,))
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


def shapes_like_the_fake(name: str, real: Tensor | Outputs, *args: Any, **kwargs: Any) -> None:
    from torch._subclasses import FakeTensorMode

    from bi_compile import ops

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = getattr(ops, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
    for r, f in zip(outputs(real), outputs(fake), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def check(name: str, reference: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Of the fake's layout, and about as near to `reference` in float64 as `reference` in the operands' dtype is.

    Few numbers: the room is a unit in the last place of what the sums would be without cancellation.
    """
    ours = call(name, *args, **kwargs)
    shapes_like_the_fake(name, ours, *args, **kwargs)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact, largest = outputs(reference(*wide)), outputs(reference(*map(magnitude, wide)))
    for o, t, e, a in zip(outputs(ours), outputs(reference(*args)), exact, largest, strict=True):
        scale = a.nan_to_num(0, 0, 0).abs().max().item() + root_mean_square(e) if e.numel() else 0.0
        unit = torch.finfo(o.dtype).eps * {torch.float32: 1, torch.float64: 32}.get(o.dtype, 0.25)
        no_worse(o, t.reshape(o.shape), e.reshape(o.shape), unit * scale)


def magnitude(a: Any) -> Any:
    return a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a


def root_mean_square(x: Tensor) -> float:
    return x.double().where(x.isfinite(), 0).square().mean().sqrt().item()


def no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, room: float = 0.0) -> None:
    """Root mean square of the error."""
    if exact.numel() == 0:
        return
    finite = exact.isfinite() & theirs.isfinite()
    torch.testing.assert_close(ours.where(~finite, 0), theirs.where(~finite, 0), rtol=0, atol=0, equal_nan=True)
    error, allowed = (root_mean_square((t.double() - exact).where(finite, 0)) for t in (ours, theirs))
    assert error <= 1.1 * allowed + room, (error, allowed, room)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("length", [0, 1, 7, 127, 128, 1031, 12288] if CUDA else [0, 1, 65])
@pytest.mark.parametrize("rows", [0, 1, 5, 67] if CUDA else [0, 1, 35])
def test_products_are_right(rows: int, length: int, dtype: torch.dtype) -> None:
    for columns in (1, 40, 0):
        a, b = draw(rows, length, dtype=dtype), draw(columns, length, dtype=dtype, seed=1).t()
        bias = draw(columns, dtype=dtype, seed=2).expand(1, columns)
        check("mm", torch.mm, a, b)
        check("addmm", lambda c, x, y: torch.addmm(c, x, y, beta=0.3, alpha=1.7), bias, a, b, beta=0.3, alpha=1.7)
        batch = a.expand(3, -1, -1), draw(3, length, columns, dtype=dtype)
        check("bmm", torch.bmm, *batch)
        check("baddbmm", torch.baddbmm, draw(3, 1, columns, dtype=dtype), *batch)
        nan = torch.full_like(bias, math.nan)
        assert same(call("addmm", nan, a, b, beta=0), call("mm", a, b))
        assert same(call("bmm", *batch)[1], call("mm", batch[0][1], batch[1][1]))
        full = bias.expand(rows, columns).t().contiguous().t()
        assert same(call("addmm", full, a, b), call("addmm", bias, a, b))


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "logsumexp": torch.logsumexp,
    "var_mean": lambda x, dim, correction=1: torch.var_mean(x, dim, correction=correction),
}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 4, 127), (2, 0, 3), (0, 5), (2, 3, 4, 5)])
def test_reductions_are_right(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    everything = list(range(len(shape)))
    for dim in {(0,), (-1,), tuple(everything[::-1]), tuple(everything[-2:])} if shape else {(0,), (-1,)}:
        check(name, REDUCTIONS[name], x, list(dim))
        kept, dropped = call(name, x, list(dim), keepdim=True), call(name, x, list(dim))
        assert same(tuple(o.view(p.shape) for o, p in zip(outputs(kept), outputs(dropped), strict=True)), dropped)
    assert same(call(name, x, []), call(name, x, everything))
    if name == "var_mean":
        for correction in (0, 0.5, 2, 400):
            check(name, REDUCTIONS[name], x, everything, correction)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cumsum"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 4, 127), (2, 0, 3), (2, 3, 4, 5)])
def test_maps_along_a_dimension_are_right(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    for dim in range(-len(shape), max(len(shape), 1)):
        check(name, getattr(torch, name), draw(*shape, dtype=dtype, scale=3), dim)


def running(x: Tensor) -> Tensor:
    """cumsum in the order that the operator promises: PyTorch's is a tree on CUDA and in float64 on a CPU."""
    total = x.new_zeros(x.shape[0], dtype=statistic(x))
    columns = [total := total + column for column in x.unbind(1)]
    return torch.stack(columns, 1).to(x.dtype)


def variance(x: Tensor) -> Tensor:
    """PyTorch's on a CPU is taken in float64, which no NPU has; this is its definition in float32."""
    wide = x.to(statistic(x))
    return ((wide - wide.mean(1, keepdim=True)).square().sum(1) / (x.shape[1] - 1)).to(x.dtype)


#: operator -> what PyTorch computes for the same x [R, C]
THEIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: x @ matrix(x),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "var_mean": lambda x: variance(x),
    "logsumexp": lambda x: x.logsumexp(1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "cumsum": lambda x: running(x),
    "rms_norm": lambda x: functional.rms_norm(x, x.shape[1:], weight(x, 1), 1e-6),
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[1:], weight(x, 1), weight(x, 2), 1e-5),
}


@pytest.mark.parametrize("dtype", [t for t in ROUNDED if t != torch.float64])
@pytest.mark.parametrize("length", [128, 1000, 8191] if CUDA else [129])
@pytest.mark.parametrize("name", THEIRS)
def test_no_less_exact_than_pytorch(name: str, length: int, dtype: torch.dtype) -> None:
    x = draw(256, length, dtype=dtype)
    ours, theirs, exact = outputs(ROW_CALLS[name](x))[0], THEIRS[name](x), THEIRS[name](x.double())
    # cuBLAS adds up a float32 product in several chains
    room = 0.5 * torch.finfo(torch.float32).eps * root_mean_square(exact) if CUDA else 0.0
    no_worse(ours.reshape(theirs.shape), theirs, exact, room)


def test_dtype_is_applied_before_the_sum() -> None:
    x = draw(3, 65, scale=100)
    for name, args in (("sum", ([1],)), ("mean", ([1],)), ("softmax", (1,)), ("log_softmax", (1,)), ("cumsum", (1,))):
        for dtype in (torch.float16, torch.float64):
            assert same(call(name, x, *args, dtype=dtype), call(name, x.to(dtype), *args))
        half = x.half()
        assert same(call(name, half, *args, dtype=torch.float32), call(name, half.float(), *args))


def test_infinite_and_nan_rows() -> None:
    inf, nan = math.inf, math.nan
    rows = [[-inf, -inf], [inf, 0.0], [inf, -inf], [nan, 0.0], [0.0, nan], [-inf, nan], [-inf, 1.0]]
    x = torch.tensor(rows, device=DEVICE)
    for name in ("softmax", "log_softmax"):
        torch.testing.assert_close(call(name, x, 1), getattr(torch, name)(x, 1), equal_nan=True)
    torch.testing.assert_close(call("logsumexp", x, [1]), torch.logsumexp(x, 1), equal_nan=True)
    var, mean = call("var_mean", x, [1])
    torch.testing.assert_close(var, torch.var(x, 1), equal_nan=True)
    torch.testing.assert_close(mean, torch.mean(x, 1), equal_nan=True)


def rms(x: Tensor, w: Tensor | None, eps: float) -> Outputs:
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True, dtype=statistic(x)) + eps)
    return (x * rstd * (1 if w is None else w)).to(x.dtype), rstd


def statistic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layer(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Outputs:
    var, mean = torch.var_mean(x.to(statistic(x)), -1, correction=0, keepdim=True)
    return functional.layer_norm(x, x.shape[-1:], w, b, eps), mean, torch.rsqrt(var + eps)


def group(x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, eps: float) -> Outputs:
    var, mean = torch.var_mean(x.to(statistic(x)).reshape(x.shape[0], groups, -1), -1, correction=0)
    return functional.group_norm(x, groups, w, b, eps), mean, torch.rsqrt(var + eps)


@pytest.mark.parametrize("heads, length", [(2, 128), (3, 64), (16, 128), (5, 96), (2, 8192), (2, 9008)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_heads_are_normalised_where_they_lie(heads: int, length: int, dtype: torch.dtype) -> None:
    """A query's heads in the output of one product for query, key and value, and their copy; at any number of rows."""
    together = draw(37, (heads + 3) * length, dtype=dtype)
    x = together[:, length : (heads + 1) * length].view(37, heads, length)
    want = call("rms_norm", x.contiguous(), weight(x, 1), 1e-6)
    for rows in (1, 2, 17, 37):
        got = call("rms_norm", x[:rows], weight(x, 1), 1e-6)
        assert all(same(g, w[:rows]) for g, w in zip(got, want, strict=True)), rows


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 7), (5, 128), (3, 4099), (0, 8)])
def test_norms_are_right(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, r = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    w, b = weight(x, 2), weight(x, 3)
    for scale in (w, None):
        check("rms_norm", rms, x, scale, 1e-6)
        y, rstd, s = call("add_rms_norm", x, r, scale, 1e-6)
        assert same(s, x + r)
        assert same((y, rstd), call("rms_norm", s, scale, 1e-6))
        for shift in (b, None):
            check("layer_norm", layer, x, scale, shift, 1e-5)
    assert same(call("rms_norm", x.half(), w.float(), 1e-6), call("rms_norm", x.half(), w.float(), 1e-6))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 7, 9), (3, 6, 1, 1)])
def test_group_norm_is_right(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = draw(*shape, dtype=dtype), draw(6, dtype=dtype, seed=2), draw(6, dtype=dtype, seed=3)
    for groups in (1, 2, 3):
        for scale, shift in ((w, b), (w, None), (None, None)):
            check("group_norm", group, x, scale, shift, groups, 1e-5)


#: where the groups of some rows end: none, one with all, empty ones, a last one that leaves rows over
ENDS = [(), (37,), (0, 5, 5, 21, 37), (1, 2, 3, 36, 37), (0, 16, 33)]


@pytest.mark.parametrize("dtype", [t for t in FLOATS if t != torch.float64])
@pytest.mark.parametrize("length", [0, 65, 1000] if CUDA else [0, 65])
@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_a_grouped_product_is_that_of_each_group(ends: tuple[int, ...], length: int, dtype: torch.dtype) -> None:
    x, w = draw(37, length, dtype=dtype), draw(len(ends), 40, length, dtype=dtype, seed=3).transpose(1, 2)
    bias = draw(len(ends), 40, dtype=dtype, seed=4)
    plain, biased = torch.zeros(2, 37, 40, dtype=dtype, device=DEVICE)
    for g, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        plain[start:end] = call("mm", x[start:end], w[g])
        biased[start:end] = call("addmm", bias[g], x[start:end], w[g])
    for offs in (torch.tensor(ends, dtype=t, device=DEVICE) for t in (torch.int32, torch.int64)):
        assert same(call("grouped_mm", x, w, offs), plain)
        assert same(call("grouped_mm", x, w.contiguous(), offs, bias), biased)
        assert same(call("grouped_mm", x.t().contiguous().t(), w, offs), plain)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [64, 65, 1000] if CUDA else [65])
def test_every_tile_of_a_product_gives_the_same_bits(length: int, dtype: torch.dtype) -> None:
    from bi_compile.kernels.triton.matmul import product
    from bi_compile.kernels.triton.tiles import PRODUCT

    a, b = draw(1, 37, length, dtype=dtype), draw(1, 70, length, dtype=dtype).transpose(1, 2)
    bias = draw(70, dtype=dtype)
    table = PRODUCT["cuda"][dtype.itemsize]
    results = [product(a.new_empty(1, 37, 70), a, b, bias, 0.3, 1.7, tile) for _, tile in table]
    for (_, tile), result in zip(table, results, strict=True):
        assert same(result, results[0]), tile


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [8, 1000, 4096])
def test_every_step_by_descriptor_gives_the_same_bits(length: int, dtype: torch.dtype) -> None:
    """Those of the kernel without descriptors too; weights as [N, K] and as [K, N], rows that lie apart."""
    from bi_compile.kernels.triton import matmul_tma
    from bi_compile.kernels.triton.matmul import product
    from bi_compile.kernels.triton.tiles import TMA_FEW_ROWS, TMA_MANY_ROWS, Tile

    steps = [step for _, step in TMA_FEW_ROWS] + TMA_MANY_ROWS
    apart = draw(300, length + 8, dtype=dtype)[:, :length]
    bias = draw(72, dtype=dtype)
    for rows in (1, 37, 300):
        a = apart[:rows]
        for b in (draw(72, length, dtype=dtype, seed=1).t(), draw(length, 72, dtype=dtype, seed=1)):
            layout = matmul_tma.tma_layout(a, b)
            assert layout is not None and matmul_tma.tma_layout(draw(length + 1, dtype=dtype)[None, 1:], b) is None
            want = product(a.new_empty(1, rows, 72), a[None], b[None], bias, 0.3, 1.7, Tile(16, 32, 4, 6))[0]
            for step in steps:
                got = a.new_empty(rows, 72)
                matmul_tma.product(got, a, b, bias.expand(rows, 72), 0.3, 1.7, layout, step)
                assert same(got, want), (rows, step)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Outputs:
    """Output and logsumexp by PyTorch."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    wide = q.to(statistic(q)) / math.sqrt(q.shape[3])
    scores = wide @ k.to(wide.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)
    return out, torch.logsumexp(scores, -1)


def heads(batch: int, count: int, length: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[B, H, L, D] as a model has it: a view of [B, L, H, D]."""
    return draw(batch, length, count, dim, dtype=dtype, seed=seed, scale=0.5).transpose(1, 2)


#: batch, query heads, key heads, queries, keys, D, Dv
ATTENTIONS = [
    (2, 2, 1, 5, 70, 16, 16),
    (1, 4, 4, 33, 33, 24, 40),
    (1, 6, 2, 1, 129, 64, 64),
    (1, 1, 1, 3, 0, 16, 16),
    (2, 2, 2, 0, 5, 16, 16),
]


#: with each dtype, where it does not take long in the interpreter
ATTENTIONS_IN = [(c, t) for c in ATTENTIONS for t in ROUNDED if CUDA or t != torch.float64 or c[3] * c[4] <= 400]


@pytest.mark.parametrize(("case", "dtype"), ATTENTIONS_IN, ids=str)
def test_attention_is_right(case: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, q_heads, kv_heads, length, keys, dim, value_dim = case
    q = heads(batch, q_heads, length, dim, dtype, 0)
    k, v = heads(batch, kv_heads, keys, dim, dtype, 1), heads(batch, kv_heads, keys, value_dim, dtype, 2)
    args = q, k, v
    if keys == 0:
        out, lse = call("scaled_dot_product_attention", *args)
        assert not out.any() and (lse == -math.inf).all()
        return
    boolean = draw(length, keys) > -1
    boolean[:, 0] = True
    for mask in (None, boolean, draw(batch, 1, length, keys, dtype=dtype)):
        check("scaled_dot_product_attention", attend, *args, mask, False)
    check("scaled_dot_product_attention", attend, *args, None, True)
    ours = call("scaled_dot_product_attention", *args, scale=0.0)[0]
    average = v.double().mean(2, True).repeat_interleave(q_heads // kv_heads, 1).expand_as(ours)
    torch.testing.assert_close(ours, average.to(dtype), atol=1e-2, rtol=1e-2)


def test_a_query_without_keys_gives_zero() -> None:
    q, k, v = (heads(1, 2, 5, 16, torch.float32, seed) for seed in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    for m in (mask, torch.zeros(5, 5, device=DEVICE).masked_fill(~mask, -math.inf)):
        out, lse = call("scaled_dot_product_attention", q, k, v, m)
        assert not out[:, :, 2].any() and (lse[:, :, 2] == -math.inf).all() and lse[:, :, :2].isfinite().all()
    q[0, 0, 1] = math.nan
    out, lse = call("scaled_dot_product_attention", q, k, v, None, True)
    assert out[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan() and out[0, 0, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS if CUDA else (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("length", [1, 16, 130, 1000] if CUDA else [40])
def test_a_query_keeps_its_bits_among_others(length: int, dtype: torch.dtype) -> None:
    keys = length + 40
    q = heads(3, 4, length, 48, dtype, 0)
    k, v = heads(3, 2, keys, 48, dtype, 1), heads(3, 2, keys, 48, dtype, 2)
    mask = draw(3, 1, length, keys) > -1

    def attention(*args: Any) -> Outputs:
        return call("scaled_dot_product_attention", *args)

    for causal, m in ((False, None), (True, None), (False, mask), (False, draw(3, 1, length, keys, dtype=dtype))):
        every = attention(q, k, v, m, causal)
        for i in {0, 1, length // 2, length - 1} & set(range(length)):
            for b in (0, 2):
                lone = m[b : b + 1, :, i : i + 1] if m is not None else None
                if causal:
                    lone = (torch.arange(keys, device=DEVICE) <= i).expand(1, 1, 1, keys)
                alone = attention(q[b : b + 1, :, i : i + 1], k[b : b + 1], v[b : b + 1], lone)
                if causal:  # a mask is another kernel: only that other queries do not matter is promised
                    part = attention(*(t[b : b + 1, :, : i + 1] for t in (q, k, v)), None, True)
                    alone = tuple(o[:, :, i : i + 1] for o in part)
                assert same(tuple(o[b : b + 1, :, i : i + 1] for o in every), alone), (causal, m is None, i, b)
    packed = attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    assert same(packed, attention(q, k, v, mask.expand(3, 4, -1, -1).contiguous()))
    assert same(packed, attention(q, k, v, mask.expand(3, 4, -1, -1).transpose(2, 3).contiguous().transpose(2, 3)))


def test_keys_behind_the_last_seen_one_do_not_matter() -> None:
    q, k, v = (heads(1, 2, length, 16, torch.float32, seed) for seed, length in enumerate((5, 200, 200)))
    seen = torch.arange(200, device=DEVICE) < 71
    expected = call("scaled_dot_product_attention", q, k, v, seen.expand(5, 200))
    for keys in (71, 100, 130):
        part = call("scaled_dot_product_attention", q, k[:, :, :keys], v[:, :, :keys], seen[:keys].expand(5, keys))
        assert same(part, expected)
    v[:, :, 128:] = math.nan
    assert same(call("scaled_dot_product_attention", q, k, v, seen.expand(5, 200)), expected)


@pytest.mark.parametrize("dtype", FLOATS if CUDA else HALVES)
@pytest.mark.parametrize("dim", [64, 128, 256] if CUDA else [16])
def test_every_tile_of_attention_gives_the_same_bits(dim: int, dtype: torch.dtype) -> None:
    from bi_compile.kernels.triton.attention import attention
    from bi_compile.kernels.triton.tiles import ATTENTION

    length, keys = (70, 150) if CUDA else (20, 70)
    q, k, v = (heads(1, count, n, dim, dtype, n) for count, n in ((4, length), (2, keys), (2, keys)))
    table = ATTENTION["cuda"][dtype.itemsize]
    for causal in (False, True):
        for mask in (None, draw(length, keys) > -1, draw(length, keys, dtype=dtype)):
            results = []
            for _, tile in table:
                outs = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=statistic(q))
                results.append(attention(q, k, v, mask, causal, None, outs, tile))
            for (_, tile), result in zip(table, results, strict=True):
                assert same(result, results[0]), tile


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("length", "columns"), [(4096, 4096), (12288, 4096), (1024, 3072)])
def test_a_product_keeps_its_bits_at_every_number_of_rows(length: int, columns: int, dtype: torch.dtype) -> None:
    a = draw(4096, length, dtype=dtype)
    b = draw(columns, length, dtype=dtype, seed=1, scale=0.02).t()
    every = call("mm", a, b)
    no_worse(every, torch.mm(a, b), a.double() @ b.double())
    for rows in (*range(1, 258), 512, 1024, 4095):
        assert same(call("mm", a[:rows], b), every[:rows]), rows
    assert same(call("mm", a[1000:1001], b.contiguous()), every[1000:1001])


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
