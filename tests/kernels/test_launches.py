"""The C++ that launches on CUDA launches what Triton's functions would, whatever came before. No device: see `cuda_stand_in`."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import cuda_stand_in as device
from support import FLOATS

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
        metadata = None

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
    launched = launches.Launched(Kernel, Compiled, 1, (x, out, 16, 3, 1), {})
    assert launches.arguments(launched, [x, out]) == ([0, 0, 2, 1], [0, 1, 16, 0], [8, 8, 4, 4], [])
    with pytest.raises(ValueError, match="x is not what the operator was given"):
        launches.arguments(launched, [x.clone(), out])


# ---- rows ----

#: operator -> its arguments, of a tensor, a weight, a residual and one of two choices
ROWS: dict[str, Callable[[Tensor, Tensor | None, Tensor, int], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "rms_norm": lambda x, w, r, i: ((x, w, (1e-6, 1e-5)[i]), {}),
    "add_rms_norm": lambda x, w, r, i: ((x, r, w, (1e-6, 1e-5)[i]), {}),
    "softmax": lambda x, w, r, i: ((x, -1), {"dtype": (None, torch.float32)[i]}),
    "log_softmax": lambda x, w, r, i: ((x, x.dim() - 1), {"dtype": (None, torch.float32)[i]}),
    "sum": lambda x, w, r, i: ((x, [-1], bool(i)), {}),
    "mean": lambda x, w, r, i: ((x, [x.dim() - 1]), {"dtype": (None, torch.float32)[i]}),
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
        # of which each differs from the first in one stride or size
        torch.empty(rows, 8, 16384, dtype=dtype)[:, :4, :length],
        torch.empty(rows, 8, 16384, dtype=dtype)[:, :2, :length],
        torch.empty(rows, 16, 16384, dtype=dtype)[:, :4, :length],
        torch.empty(rows, 4, 32768, dtype=dtype)[:, :4, :length],
        torch.empty(rows, 131072, dtype=dtype)[:, :length],
        torch.empty(rows, 262144, dtype=dtype)[:, :length],
    ]


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    """Layouts, lengths, dtypes and heights in an order that mixes them."""
    draw = random.Random(0)
    native = 0
    for _ in range(1500):
        length, dtype = draw.choice([1, 96, 128, 1000, 9008]), draw.choice(FLOATS)
        every = layouts(draw.choice([1, 2, 37]), length, dtype)
        x = draw.choice(every)
        residual = draw.choice([y for y in every if y.shape == x.shape])
        x, residual = device.on_device(x), device.on_device(residual)
        kind = draw.choice([None, dtype, torch.float32])
        weight = None if kind is None else device.on_device(torch.empty(length, dtype=kind))
        args, options = ROWS[name](x, weight, residual, draw.choice([0, 1]))
        second = compare(
            lambda: kernels.IMPLEMENTATIONS[name](*args, **options),
            lambda: getattr(torch.ops.bi_compile, name)(*args, **options),
            x, weight, residual,
        )  # fmt: skip
        native += second
        if dtype != torch.float64 and all(y.is_contiguous() and y.data_ptr() % 16 == 0 for y in (x, residual)):
            assert second, args[1:]
    assert native > 300


def test_queries_and_keys() -> None:
    """In one launch where a head's norm alone reads its row by the same threads; else in two."""
    draw = random.Random(0)
    for _ in range(600):
        heads, length = draw.choice([(16, 8), (8, 16), (4, 1), (3, 1)]), draw.choice([64, 128, 40, 96])
        dtype = draw.choice(FLOATS)
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


# ---- products ----

#: what a product may be, property by property
PRODUCT: dict[str, list[Any]] = {
    "m": [1, 2, 7, 16, 17, 33, 64, 65, 300, 5000],
    "n": [1, 2, 128, 1000, 4096],
    "k": [1, 8, 96, 1000, 1024],
    "dtype": [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float64],
    # how a and b lie: in rows, in columns, with elements between the rows, from the first element that is not aligned
    "a": ["rows", "rows", "columns", "gaps", "unaligned"],
    "b": ["columns", "columns", "rows", "gaps", "unaligned"],
    "bias": [None, None, "n", "m n", "1 n", "m 1", "1", "gaps", "unaligned"],
    "beta": [1, 1, 1, 1.0, 0.5, 0],
    "alpha": [1, 1, 1, 2],
}


def lying(how: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if how == "columns":
        return device.on_device(torch.empty(columns, rows, dtype=dtype)).t()
    if how == "gaps":
        return device.on_device(torch.empty(rows, columns + 16, dtype=dtype)[:, :columns])
    line = torch.empty(rows * columns + 8, dtype=dtype)
    begin = how == "unaligned"
    return device.on_device(line[begin : rows * columns + begin].view(rows, columns))


@pytest.mark.parametrize("seed", range(2))
def test_products(seed: int) -> None:
    """Each differs from the one before in one property."""
    draw = random.Random(seed)
    of = {name: draw.choice(values) for name, values in PRODUCT.items()}
    native = 0
    for _ in range(1500):
        changed = draw.choice(list(PRODUCT))
        of[changed] = draw.choice(PRODUCT[changed])
        m, n, k, dtype = of["m"], of["n"], of["k"], of["dtype"]
        a, b = lying(of["a"], m, k, dtype), lying(of["b"], k, n, dtype)
        shape = {"n": (1, n), "1 n": (1, n), "m 1": (m, 1), "1": (1, 1)}.get(of["bias"], (m, n))
        if of["bias"] is None or dtype == torch.float64:  # its epilogue is PyTorch's, which is not here
            bias = None
        else:
            bias = lying(of["bias"], *shape, dtype)
        if bias is not None and of["bias"] in ("n", "1"):
            bias = bias[0]
        name, args, options = (
            ("mm", (a, b), {}) if bias is None else ("addmm", (bias, a, b), {"beta": of["beta"], "alpha": of["alpha"]})
        )
        second = compare(
            lambda: kernels.IMPLEMENTATIONS[name](*args, **options),
            lambda: getattr(torch.ops.bi_compile, name)(*args, **options),
            a, b, bias, capturing=draw.random() < 0.2,
        )  # fmt: skip
        plain = bias is None or of["beta"] == of["alpha"] == 1
        aligned = all(x is None or x.data_ptr() % 16 == 0 for x in (a, b, bias))
        assert second == (dtype != torch.float64 and plain and aligned), of
        native += second
    assert native > 300


# ---- attention of a server's step ----

#: property of a step -> what it may be. Memory: for how many heads of how many elements there is room, before them keys of a page.
STEP: dict[str, list[Any]] = {
    "heads": [(16, 8), (8, 8), (16, 2), (7, 1), (24, 2), (40, 1)],
    "size": [64, 128, 96, 40, 256],
    "value": [1, 2],
    "page": [16, 64, 48, 128],
    "dtype": [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32],
    # of which each has one stride of its own
    "memory of q": [None, (48, 512), (96, 256), (96, 512)],
    **{f"memory of {x}": [None, (128, 16, 256), (128, 8, 512), (256, 8, 256), (256, 16, 256)] for x in "kv"},
    "k begins at": [0] * 9 + [1],
    "scale": [0.125, 0.1],
    "window": [(-1, 0), (-1, 0), (100, 0), (100, 3)],
    "requests": [1, 2, 3, 17, 64, 300],
    "tokens": [(1,), (1,), (1, 0, 2, 5), (30,), (700, 1), (200, 300)],
    "keys before": [(0,), (7,), (300,), (5000, 0)],
    "tokens behind": [0, 0, 5],
    "longest": ["unknown", "exact", "more"],
    "most": [0, 100],
    "table": [0, 3],
}  # fmt: skip


def step(of: dict[str, Any], draw: random.Random) -> tuple[list[Tensor], list[Any]]:
    """What `fill_paged` takes: tensors and numbers."""
    (heads, key_heads), size, page, dtype = of["heads"], of["size"], of["page"], of["dtype"]
    value = size // of["value"]
    tokens = [draw.choice(of["tokens"]) for _ in range(of["requests"])]
    keys = [n + draw.choice(of["keys before"]) for n in tokens]
    every = sum(tokens) + of["tokens behind"]  # as in a graph that is padded

    def lies(name: str, first: int, *sizes: int, begin: int = 0) -> Tensor:
        """[first, *sizes], in as much memory as there is for each of them."""
        room = of[f"memory of {name}"] or sizes
        x = torch.empty(first * math.prod(room) + begin, dtype=dtype)[begin:].view(first, *room)
        for dim, size in enumerate(sizes, 1):
            x = x.narrow(dim, 0, size)
        return x

    q = lies("q", every, heads, size)
    k = lies("k", 3, page, key_heads, size, begin=of["k begins at"])
    v = lies("v", 3, page, key_heads, value)
    table = torch.zeros(of["requests"], max(1, -(-max(keys) // page)) + of["table"], dtype=torch.int32)
    ends = torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32)[1:]
    counts = torch.tensor(keys, dtype=torch.int32)
    out = torch.empty(every, heads, value, dtype=dtype)
    longest = {"unknown": 0, "exact": max(tokens), "more": max(tokens) + 1}[of["longest"]]
    return [device.on_device(x) for x in (out, q, k, v, ends, counts, table)], [
        of["scale"],
        *of["window"],
        longest,
        max(keys) + of["most"],
    ]


@pytest.mark.parametrize("seed", range(4))
def test_attention_of_a_server(seed: int) -> None:
    """Each step differs from the one before in one property: what is launched follows it, in a graph that is captured or not."""
    draw = random.Random(seed)
    of = {name: draw.choice(values) for name, values in STEP.items()}
    native = 0
    for _ in range(1500):
        changed = draw.choice(list(STEP))
        of[changed] = draw.choice(STEP[changed])
        (out, *tensors), numbers = step(of, draw)
        if out.numel() == 0:
            continue
        second = compare(
            lambda: launches.fill_paged(out, *tensors, *numbers),
            lambda: torch.ops.bi_compile_cuda.fill_paged(out, *tensors, *numbers),
            out, *tensors, capturing=draw.random() < 0.2,
        )  # fmt: skip
        assert second == (out.dtype != torch.float32 and tensors[1].data_ptr() % 16 == 0), of
        native += second
    assert native > 700
