"""The C++ that launches on CUDA launches what Triton's functions would, whatever came before. No device: see `cuda_stand_in`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import cuda_stand_in as device

from bi_compile.kernels import triton as kernels
from bi_compile.kernels.cuda import launches

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA: test_cuda.py has the device"),
    pytest.mark.xdist_group("cuda_stand_in"),  # one process compiles and loads it
]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    device.load()


def compare(
    python: Callable[[], object], native: Callable[[], object], *given: Tensor | None, capturing: bool = False
) -> bool:
    """Whether the second of two calls was launched from C++; each launches what Python's function does."""
    with device.watched(*given, capturing=capturing) as wanted:
        python()
    for _ in range(2):
        with device.watched(*given, capturing=capturing) as seen:
            native()
        assert wanted.python == (seen.python or seen.cpp) and not (seen.python and seen.cpp)
    return bool(seen.cpp)


def test_arguments_of_a_launch() -> None:
    class Kernel:
        arg_names = ("x", "out", "stride", "R", "C", "BLOCK")
        do_not_specialize = ("R",)

    class Compiled:
        class src:
            signature = {
                "x": "*bf16",
                "out": "*fp32",
                "stride": "i32",
                "R": "i32",
                "C": "constexpr",
                "BLOCK": "constexpr",
            }

    x, out = torch.empty(3, 1), torch.empty(3)
    launched = launches.Launched(Kernel, Compiled, (x, out, 16, 3, 1), {})
    assert launches.arguments(launched, [x, out]) == ([0, 0, 2, 1], [0, 1, 16, 0], [8, 8, 4, 4])
    with pytest.raises(ValueError, match="x is not what the operator was given"):
        launches.arguments(launched, [x.clone(), out])


# ---- rows ----

ROWS: dict[str, Callable[[Callable[..., Any], Tensor, Tensor | None, Tensor], Any]] = {
    "rms_norm": lambda f, x, w, r: f(x, w, 1e-6),
    "add_rms_norm": lambda f, x, w, r: f(x, r, w, 1e-5),
    "softmax": lambda f, x, w, r: f(x, -1),
    "log_softmax": lambda f, x, w, r: f(x, x.dim() - 1, dtype=torch.float32),
    "sum": lambda f, x, w, r: f(x, [-1]),
    "mean": lambda f, x, w, r: f(x, [x.dim() - 1], True, dtype=torch.float32),
}


def layouts(rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    together = torch.empty(rows, 6 * length, dtype=dtype)
    line = torch.empty(rows * length + 8, dtype=dtype)
    return [
        torch.empty(rows, length, dtype=dtype),
        together[:, length : 2 * length],
        together[:, length : 5 * length].view(rows, 4, length),
        torch.empty(2, rows, length, dtype=dtype),
        torch.empty(length, dtype=dtype),
        line[1 : rows * length + 1].view(rows, length),
        torch.empty(length, rows, dtype=dtype).t(),
    ]


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    """Every layout, length, dtype and height, in an order that mixes them."""
    operator = getattr(torch.ops.bi_compile, name)
    cases = [
        (i, rows, length, dtype, weight)
        for i, rows, length, dtype, weight in itertools.product(
            range(7), (1, 2, 37, 1000), (1, 96, 128, 1000, 9008), (torch.bfloat16, torch.float16, torch.float32, torch.float64),
            (None, torch.bfloat16, torch.float32) if "norm" in name else (None,),
        )
    ]  # fmt: skip
    random.Random(0).shuffle(cases)
    native = 0
    for i, rows, length, dtype, kind in cases[:600]:
        x = device.on_device(layouts(rows, length, dtype)[i])
        residual = device.on_device(layouts(rows, length, dtype)[(i + rows) % 2 if i < 2 else i])
        weight = None if kind is None else device.on_device(torch.empty(length, dtype=kind))
        call = ROWS[name]
        second = compare(
            lambda: call(kernels.IMPLEMENTATIONS[name], x, weight, residual),
            lambda: call(operator, x, weight, residual),
            x, weight, residual,
        )  # fmt: skip
        native += second
        if i == 0 and residual.data_ptr() % 16 == 0 and residual.is_contiguous() and dtype != torch.float64:
            assert second, (rows, length, dtype, kind)
    assert native > len(cases[:600]) // 4


def test_queries_and_keys() -> None:
    """In one launch where a head's norm alone reads its row by the same threads; else in two."""
    draw = random.Random(0)
    for _ in range(600):
        heads, length = draw.choice([(16, 8), (8, 16), (4, 1), (3, 1)]), draw.choice([64, 128, 40, 96])
        dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32, torch.float64])
        width = draw.choice([4096, (sum(heads) + 3) * length, (sum(heads) + 3) * length + 8])
        qkv = device.on_device(torch.empty(draw.choice([1, 2, 37, 1000]), width, dtype=dtype))
        kind = draw.choice([dtype, torch.float32])
        weights = [device.on_device(torch.empty(length, dtype=kind)) for _ in range(2)]
        args = (qkv, *weights, *heads, draw.choice([1e-6, 1e-5]))
        if length % 16 or width % 16:
            with device.watched(qkv, *weights) as seen:
                torch.ops.bi_compile.qk_norm(*args)
            assert [launch.what.split()[0] for launch in seen.python + seen.cpp] == ["_rms_norm"] * 2
            continue
        second = compare(
            lambda: kernels.IMPLEMENTATIONS["qk_norm"](*args),
            lambda: torch.ops.bi_compile.qk_norm(*args),
            qkv, *weights,
        )  # fmt: skip
        assert second == (dtype != torch.float64), args[3:]


# ---- attention of a server's step ----


def step(draw: random.Random) -> tuple[list[Tensor], list[Any]]:
    """Tensors and numbers of `fill_paged`: some model, which often lies in memory as others do, and requests of any kind."""
    heads, key_heads = draw.choice([(16, 8), (8, 8), (16, 2), (7, 1), (24, 2), (40, 1)])
    size = draw.choice([64, 128, 128, 96, 40, 256])
    value = draw.choice([size, size, size // 2])
    page = draw.choice([16, 64, 64, 48, 128])
    dtype = draw.choice([torch.bfloat16] * 3 + [torch.float16, torch.float32])
    many = draw.choice([1, 1, 2, 3, 17, 64, 300])
    tokens = [1] * many if draw.random() < 0.4 else [draw.choice([1, 1, 1, 0, 2, 5, 30, 700]) for _ in range(many)]
    keys = [n + draw.choice([0, 0, 7, 255, 300, 5000]) for n in tokens]
    every = sum(tokens) + draw.choice([0, 0, 5])  # those behind the last request are a graph's that is padded
    if draw.random() < 0.5:  # as wide as the widest
        q = torch.empty(every, 40, 256, dtype=dtype)[:, :heads, :size]
        k, v = torch.empty(2, 3, 128, 8, 256, dtype=dtype)[:, :, :page, :key_heads]
        k, v = k[..., :size], v[..., :value]
    else:
        q = torch.empty(every, (heads + 2 * key_heads) * size, dtype=dtype)[:, : heads * size].unflatten(
            1, (heads, size)
        )
        k, v = torch.empty(3, 2, page, key_heads, size, dtype=dtype).unbind(1)
        v = v[..., :value]
    if draw.random() < 0.05:  # no multiple of 16 bytes
        k = torch.empty(k.numel() + 1, dtype=dtype)[1:].view(k.shape)
    table = torch.zeros(many, max(1, -(-max(keys) // page)) + draw.choice([0, 3]), dtype=torch.int32)
    ends = torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32)[1:]
    out = torch.empty(every, heads, value, dtype=dtype)
    left, right = draw.choice([(-1, 0), (-1, 0), (100, 0), (100, 3)])
    longest = draw.choice([0, max(tokens), max(tokens) + 1])
    numbers = [draw.choice([0.125, 0.1]), left, right, longest, draw.choice([max(keys), max(keys) + 100])]
    return [device.on_device(x) for x in (out, q, k, v, ends, torch.tensor(keys, dtype=torch.int32), table)], numbers


@pytest.mark.parametrize("seed", range(4))
def test_attention_of_a_server(seed: int) -> None:
    """Steps of several models in turns, in a graph that is captured and not: what is launched follows the step, never the one before."""
    draw = random.Random(seed)
    native = 0
    for _ in range(1500):
        (out, *tensors), numbers = step(draw)
        if out.numel() == 0:
            continue

        def python() -> None:
            launches.fill_paged(out, *tensors, *numbers)

        def cpp() -> None:
            torch.ops.bi_compile_cuda.fill_paged(out, *tensors, *numbers)

        second = compare(python, cpp, out, *tensors, capturing=draw.random() < 0.2)
        assert second == (out.dtype != torch.float32 and tensors[1].data_ptr() % 16 == 0), (out.shape, numbers)
        native += second
    assert native > 700
