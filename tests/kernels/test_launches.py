"""The C++ that launches on CUDA launches what Triton's functions would, whatever came before. No device: see `cuda_stand_in`."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

pytest.importorskip("triton")
import cuda_stand_in as device
from support import FLOATS

from bi_compile.kernels import triton as kernels
from bi_compile.kernels.cuda import PRODUCTS, RECORDED, launches, recorded

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA: test_cuda.py has the device"),
    pytest.mark.xdist_group("cuda_stand_in"),  # one process compiles and loads it
]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    device.load()


def compare(
    python: Callable[[], object],
    native: Callable[[], object],
    *given: Tensor | None,
    capturing: bool = False,
    calls: int = 2,
) -> bool:
    """Whether the last of some calls was launched from C++; each launches what Python's function does."""
    with device.watched(*given, capturing=capturing) as wanted:
        python()
    for _ in range(calls):
        with device.watched(*given, capturing=capturing) as seen:
            native()
        assert wanted.python == (seen.python or seen.cpp) and not (seen.python and seen.cpp)
    return bool(seen.cpp)


def drawn_in_turn(properties: dict[str, list[Any]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """A value of each property, 1,500 times; one of them is drawn anew each time."""
    of = {name: draw.choice(values) for name, values in properties.items()}
    for _ in range(1500):
        changed = draw.choice(list(properties))
        of[changed] = draw.choice(properties[changed])
        yield of


def test_a_launch_is_described() -> None:
    plan = device.metadata(num_warps=4, shared=100)
    types = {
        "x": "*bf16",
        "out": "*fp32",
        "stride": "i32",
        "R": "i32",
        "eps": "fp32",
        "C": "constexpr",
        "BLOCK": "constexpr",
    }
    kernel = SimpleNamespace(arg_names=tuple(types), do_not_specialize=("R",))
    compiled = SimpleNamespace(metadata=plan, function=7, src=SimpleNamespace(signature=types))
    x, out = torch.empty(3, 1), torch.empty(3)
    launched = launches.Launched(kernel, compiled, 2, (x, out, 16, 3, 1.0, 1), {})
    both = [x.data_ptr(), out.data_ptr()]

    def slot_of(index: int, given: Tensor) -> int | None:
        return both.index(given.data_ptr()) if given.data_ptr() in both else None

    head = [7, 128, 100, 2, 5, 0, 0, 8, 0, 1, 8, 2, 16, 4]
    eps = [2, 0x3F800000, 4]
    assert launches.described(launched, slot_of, exact=False) == [*head, 1, 0, 4, *eps]
    assert launches.described(launched, slot_of, exact=True) == [*head, 2, 3, 4, *eps]
    with pytest.raises(ValueError, match="out is not what the operator was given"):
        both.pop()
        launches.described(launched, slot_of, exact=True)
    plan.launch_pdl = True
    with pytest.raises(ValueError, match="no plain launch"):
        launches.described(launched, slot_of, exact=True)


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
    native = 0
    for of in drawn_in_turn(PRODUCT, draw):
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
            a, b, bias, capturing=draw.random() < 0.2, calls=3,
        )  # fmt: skip
        assert second == all(x is None or x.data_ptr() % 16 == 0 for x in (a, b, bias)), of
        native += second
    assert native > 300


# ---- other operators ----


def given(draw: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """In one of several layouts."""
    memory = torch.empty(2, *(n + 16 for n in shape), dtype=dtype)
    which, begin = draw.choice([0, 0, 1]), draw.choice([0, 0, 0, 1])
    gaps = memory[which]
    for dim, n in enumerate(shape):
        gaps = gaps.narrow(dim, begin if dim == len(shape) - 1 else 0, n)
    flat = memory.view(-1)[: math.prod(shape)]
    turned = flat.view(*shape[:-2], *shape[: -3 if len(shape) > 1 else -2 : -1]).transpose(-1, max(-2, -len(shape)))
    return device.on_device(draw.choice([flat.view(shape), flat.view(shape), gaps, turned]))


def some(draw: random.Random, make: Callable[[], Tensor]) -> Tensor | None:
    return make() if draw.random() < 0.5 else None


def case(name: str, draw: random.Random, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    b, m, k, n = draw.choice([1, 3]), draw.choice([1, 5, 64]), draw.choice([16, 96, 24]), draw.choice([16, 40])
    x, channels = given(draw, dtype, b, m, k), device.on_device(torch.empty(k, dtype=dtype))
    match name:
        case "bmm":
            return [x, draw.choice([x.mT, given(draw, dtype, b, k, m), given(draw, dtype, b, k, n)])], {}
        case "baddbmm":
            bias = draw.choice([given(draw, dtype, b, m, n), given(draw, dtype, m, n), given(draw, dtype, n)])
            return [bias, x, given(draw, dtype, b, k, n)], {
                "beta": draw.choice([1, 0.5, 0]),
                "alpha": draw.choice([1, 2]),
            }
        case "grouped_mm":
            offs = device.on_device(torch.zeros(b, dtype=torch.int32))
            bias = some(draw, lambda: given(draw, dtype, b, n))
            return [x[0], given(draw, dtype, b, k, n), offs, bias], {"counts": draw.random() < 0.5}
        case "cumsum":
            return [x, draw.choice([-1, 2])], {"dtype": draw.choice([None, torch.float32])}
        case "logsumexp" | "var_mean":
            return [
                x,
                [draw.choice([-1, 2, 1])],
                *([] if name == "logsumexp" else [draw.choice([1, 0])]),
                draw.random() < 0.5,
            ], {}
        case "layer_norm":
            return [x, *(draw.choice([None, channels]) for _ in "wb"), draw.choice([1e-5, 1e-6])], {}
        case "group_norm":
            return [x.mT, *(draw.choice([None, channels]) for _ in "wb"), draw.choice([2, 4]), 1e-5], {}
        case "scaled_dot_product_attention":
            length, keys = draw.choice([1, 1, 70]), draw.choice([1, 70, 3000])
            q, kv = given(draw, dtype, b, 4, length, k), [given(draw, dtype, b, 2, keys, k) for _ in "kv"]
            mask = some(draw, lambda: given(draw, dtype, 1, 1, length, keys))
            return [q, kv[0], draw.choice(kv), mask, mask is None], {"scale": draw.choice([None, 0.1])}
    raise ValueError(name)


#: mm_segments adds up by other means, paged_attention launches on a view of a tensor
@pytest.mark.parametrize("name", sorted({*RECORDED} - {*PRODUCTS, "mm_segments", "paged_attention"}))
def test_recorded(name: str) -> None:
    """Layouts, sizes, dtypes and numbers in an order that mixes them, tensors that are given twice among them."""
    draw = random.Random(0)
    native = 0
    for _ in range(400):
        args, options = case(name, draw, draw.choice(FLOATS[:3] if name in ("baddbmm", "grouped_mm") else FLOATS))
        results: list[Any] = []
        native += compare(
            lambda: results.append(kernels.IMPLEMENTATIONS[name](*args, **options)),
            lambda: results.append(getattr(torch.ops.bi_compile, name)(*args, **options)),
            *(x for x in args if isinstance(x, Tensor)), capturing=draw.random() < 0.2, calls=3,
        )  # fmt: skip
        wanted, *others = ([(x.shape, x.stride(), x.dtype) for x in pytree.tree_leaves(r)] for r in results)
        assert others == [wanted] * 3
        assert len({x.data_ptr() for x in pytree.tree_leaves(results[-1])}) == len(wanted)
    assert native > 100  # the others copy a tensor, or are not aligned


def test_what_cannot_be_recorded() -> None:
    """It computes by other means, returns no memory of its own, or launches on memory that it was not given."""
    x = torch.zeros(4)
    types = {"x": "*fp32", "out": "*fp32"}
    plan = device.metadata(num_warps=4, shared=100)
    compiled = SimpleNamespace(metadata=plan, function=7, src=SimpleNamespace(signature=types))
    kernel = SimpleNamespace(arg_names=tuple(types), do_not_specialize=())

    def attempt(function: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[list[Tensor], list[int], list[list[int]]]:
        with recorded._Inside() as inside:
            out, arguments = function()
        return recorded.recording([x], out, inside, [launches.Launched(kernel, compiled, 1, tuple(arguments), {})])

    def plain(out: Tensor) -> tuple[Tensor, list[Tensor]]:
        return out, [x.view(2, 2), out]

    def room() -> tuple[Tensor, list[Tensor]]:
        partial, out = x.new_empty(9), x.new_empty(2)
        return out, [partial, out]

    results, rooms, (launch,) = attempt(lambda: plain(torch.empty(4)))
    assert (results[0].shape, rooms, launch[5:]) == ((4,), [], [0, 0, 8, 0, 1, 8])
    results, rooms, (launch,) = attempt(room)
    assert (rooms, launch[5:]) == ([36], [0, 2, 8, 0, 1, 8])
    for function, words in (
        (lambda: plain(torch.empty_strided((1, 4), (77, 1))), "a result is not what was allocated"),
        (lambda: plain(torch.empty(4).fill_(1)), "it calls aten.fill_"),
        (lambda: plain(torch.zeros(4)), "it calls aten.zeros"),
        (lambda: plain(torch.empty(int(x[0].item()) + 4)), "it calls aten._local_scalar_dense"),
        (lambda: plain(torch.empty(2, 4).t()), "a result is not what was allocated"),
        (lambda: plain(torch.empty(8)[:4]), "a result is not what was allocated"),
        (lambda: plain(x[:2]), "a result is not what was allocated"),
        (lambda: (torch.empty(4), [x[1:], x]), "x is not what the operator was given"),
        (lambda: (torch.empty(4), [KEPT, x]), "x is not what the operator was given"),
    ):
        with pytest.raises(ValueError, match=words):
            attempt(function)
    with recorded._Inside() as inside:
        out = torch.empty(4)
    with pytest.raises(ValueError, match="launches nothing"):
        recorded.recording([x], out, inside, [])


#: a table that a function keeps
KEPT = torch.empty(4)


def test_a_number_too_large_for_a_float_is_infinite() -> None:
    bias, a, b = (device.on_device(torch.empty(*shape)) for shape in ((32,), (64, 128), (128, 32)))
    for alpha in (1e39, float("nan"), -float("inf")):
        for _ in range(3):
            with device.watched(bias, a, b) as seen:
                torch.ops.bi_compile.addmm(bias, a, b, alpha=alpha)
        (launch,) = seen.cpp
        (number,) = [x for x in launch.arguments if isinstance(x, float) and x != 1]
        assert number == (float("inf") if alpha == 1e39 else alpha) or (alpha != alpha and number != number)


def test_a_call_that_c_plus_plus_cannot_make_stays_in_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its result is there, and the reason is said once."""
    a, b = (device.on_device(torch.empty(*shape)) for shape in ((3, 5, 16), (3, 16, 7)))
    monkeypatch.setattr(recorded, "described", lambda *args, **options: [1, 128, 0, 1, 1, 0, 0, 8])  # another kernel's
    for _ in range(4):
        with device.watched(a, b) as seen:
            assert torch.ops.bi_compile.bmm(a, b).shape == (3, 5, 7)
        assert seen.python and not seen.cpp
    assert caplog.text.count("bmm is called from Python") == 1


def test_a_new_thread_can_launch() -> None:
    """It has no context of the device before it asks for one, and the driver's launch does not."""
    a, b = (device.on_device(torch.empty(*shape)) for shape in ((3, 9, 16), (3, 16, 7)))
    for _ in range(2):
        with device.watched(a, b):
            torch.ops.bi_compile.bmm(a, b)
    with device.watched(a, b) as seen:
        thread = threading.Thread(target=lambda: torch.ops.bi_compile.bmm(a, b))
        thread.start()
        thread.join()
    assert len(seen.cpp) == 1 and not seen.python


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
    native = 0
    for of in drawn_in_turn(STEP, draw):
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
