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


# ---- attention of a server's step ----


class Model:
    """Heads of queries and keys, elements of a head, and how they lie."""

    def __init__(
        self, heads: int, key_heads: int, size: int, value: int, page: int, packed: bool, dtype: torch.dtype
    ) -> None:
        self.heads, self.key_heads, self.size, self.value = heads, key_heads, size, value
        self.page, self.packed, self.dtype = page, packed, dtype

    def step(self, draw: random.Random) -> tuple[list[Tensor], list[Any]]:
        """Tensors and numbers of `fill_paged`, of requests of any kind."""
        many = draw.choice([1, 1, 2, 3, 17, 64, 300])
        tokens = [draw.choice([1, 1, 1, 0, 2, 5, 30, 700]) for _ in range(many)]
        if draw.random() < 0.4:
            tokens = [1] * many
        keys = [n + draw.choice([0, 0, 7, 255, 300, 5000]) for n in tokens]
        behind = draw.choice([0, 0, 5])  # tokens behind the last request, as in a graph that is padded
        every, heads = sum(tokens) + behind, (self.heads, self.key_heads, self.key_heads)
        if self.packed and self.size == self.value:
            q = torch.empty(every, sum(heads) * self.size, dtype=self.dtype)[:, : self.heads * self.size]
        else:
            q = torch.empty(every, self.heads * self.size, dtype=self.dtype)
        q = q.unflatten(1, (self.heads, self.size))
        k = torch.empty(3, self.page, self.key_heads, self.size, dtype=self.dtype)
        v = torch.empty(3, self.page, self.key_heads, self.value, dtype=self.dtype)
        if self.size == self.value and self.packed:
            k, v = torch.empty(3, 2, self.page, self.key_heads, self.size, dtype=self.dtype).unbind(1)
        if draw.random() < 0.05:  # no multiple of 16 bytes
            k = torch.empty(k.numel() + 1, dtype=self.dtype)[1:].view(k.shape)
        table = torch.zeros(many, max(1, -(-max(keys) // self.page)) + draw.choice([0, 3]), dtype=torch.int32)
        ends = torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32)[1:]
        counts = torch.tensor(keys, dtype=torch.int32)
        out = torch.empty(every, self.heads, self.value, dtype=self.dtype)
        longest = draw.choice([0, max(tokens), max(tokens) + 1])
        most = draw.choice([max(keys), max(keys) + 100])
        left, right = draw.choice([(-1, 0), (-1, 0), (100, 0), (100, 3)])
        numbers = [self.size**-0.5, left, right, longest, most]
        return [device.on_device(x) for x in (out, q, k, v, ends, counts, table)], numbers


MODELS = [
    Model(16, 8, 128, 128, 16, True, torch.bfloat16), Model(16, 8, 128, 128, 64, True, torch.bfloat16),
    Model(16, 8, 128, 128, 64, False, torch.bfloat16), Model(16, 8, 128, 128, 64, True, torch.float16),
    Model(8, 2, 64, 64, 128, True, torch.bfloat16), Model(4, 4, 96, 96, 48, False, torch.bfloat16),
    Model(7, 1, 40, 40, 16, False, torch.bfloat16), Model(24, 2, 128, 128, 64, True, torch.bfloat16),
    Model(40, 1, 64, 64, 64, True, torch.bfloat16), Model(8, 8, 256, 256, 64, True, torch.bfloat16),
    Model(8, 4, 64, 32, 64, False, torch.bfloat16), Model(16, 8, 64, 64, 64, True, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_attention_of_a_server(seed: int) -> None:
    """Steps of several models in turns, in a graph that is captured and not: what is launched follows the step, never the one before."""
    draw = random.Random(seed)
    native = 0
    for _ in range(1000):
        model = draw.choice(MODELS)
        (out, *tensors), numbers = model.step(draw)
        if out.numel() == 0:
            continue

        def python() -> None:
            launches.fill_paged(out, *tensors, *numbers)

        def cpp() -> None:
            torch.ops.bi_compile_cuda.fill_paged(out, *tensors, *numbers)

        second = compare(python, cpp, out, *tensors, capturing=draw.random() < 0.2)
        taken = model.dtype != torch.float32 and tensors[1].data_ptr() % 16 == 0
        assert second == taken, (vars(model), numbers)
        native += second
    assert native > 500
