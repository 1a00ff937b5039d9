"""The native kernels for CUDA: what the proof admits and refuses, and the bits of what it admits.

The proof's logic runs anywhere, with a stand-in for cuBLASLt. What is marked `cuda` needs a device.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import same_bits
from torch import Tensor

from bi_compile import ops

pytest.importorskip("triton")
from bi_compile.kernels import cuda as kernels
from bi_compile.kernels.cuda import launches, proof
from bi_compile.kernels.cuda.build import EXTENSION
from bi_compile.kernels.triton.launch import watching

CUDA = torch.cuda.is_available()
cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
HEIGHTS = (1, 4, 16)


class StandIn:
    """In place of cuBLASLt: an "algorithm" is a number that says in how many parts it sums K; the time is made up."""

    def __init__(self, offered: Sequence[int]) -> None:
        self.offered = offered

    def algorithms(self, a: Tensor, b: Tensor, bias: Tensor | None) -> list[Tensor]:
        return [torch.tensor([parts], dtype=torch.uint8) for parts in self.offered]

    def describe(self, algorithm: Tensor) -> str:
        return f"K in {int(algorithm)} part(s)"

    def run(self, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, algorithm: Tensor) -> bool:
        parts = int(algorithm)
        if parts > 9:
            return False
        total = torch.zeros(out.shape, dtype=torch.float32)
        for left, right in zip(a.chunk(parts, 1), b.chunk(parts, 0), strict=True):
            products = left.float()[:, :, None] * right.float()
            total += torch.from_numpy(np.add.accumulate(products.numpy(), axis=1)[:, -1])  # one after the other
        out.copy_(total if bias is None else total + bias.float())
        return True

    def microseconds(self, candidates: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
        return [10.0] * len(candidates)


def stand_in_proof(
    monkeypatch: pytest.MonkeyPatch, offered: Sequence[int], dtype: torch.dtype, form: int = 0
) -> list[proof.Choice]:
    def one_part(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        StandIn([]).run(out, a, b, bias, torch.tensor([1]))

    monkeypatch.setattr(proof, "reference", one_part)
    monkeypatch.setattr(proof, "HIGHEST", 20)
    monkeypatch.setattr(proof, "CACHE", 2**14)  # few weights to draw
    problem = proof.Problem(48, 64, dtype, torch.device("cpu"), form != 1, form)
    return proof.prove(problem, HEIGHTS, StandIn(offered))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", range(len(proof.FORMS)))
def test_the_proof_admits_the_order_and_refuses_another(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: int
) -> None:
    for choice in stand_in_proof(monkeypatch, [2, 1], dtype, form):
        assert choice.what == "K in 1 part(s)" and choice.refused == ["K in 2 part(s)"]


def test_where_nothing_passes_the_triton_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in stand_in_proof(monkeypatch, [2, 4, 8], torch.bfloat16):
        assert choice.algorithm == "" and choice.what == "the Triton kernel" and len(choice.refused) == 3
    # 10: the library refuses to run it
    assert all(c.algorithm == "" for c in stand_in_proof(monkeypatch, [10], torch.bfloat16))


def test_one_row_may_run_what_serves_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        StandIn, "algorithms", lambda self, a, b, bias: [torch.tensor([2 if len(a) == 1 else 1], dtype=torch.uint8)]
    )
    first, second, *_ = stand_in_proof(monkeypatch, [], torch.float32)
    assert (first.what, first.refused) == ("K in 1 part(s)", ["K in 2 part(s)"])
    assert (second.what, second.refused) == ("K in 1 part(s)", [])


@pytest.mark.parametrize(
    ("native", "triton", "where"),
    [
        (20.0, 19.0, proof.EVERYWHERE),
        (20.0, 19.8, proof.OUTSIDE_GRAPHS),
        (20.0, 20.1, proof.NOWHERE),
        (5.0, 4.8, proof.EVERYWHERE),
        (5.0, 10.0, proof.OUTSIDE_GRAPHS),
        (5.0, 11.0, proof.NOWHERE),
    ],
)
def test_the_faster_kernel_computes_a_product(
    monkeypatch: pytest.MonkeyPatch, native: float, triton: float, where: int
) -> None:
    """Of device and host the slower decides; in a CUDA graph the device alone."""
    monkeypatch.setattr(StandIn, "microseconds", lambda self, candidates: [*[native] * (len(candidates) - 1), triton])
    for choice in stand_in_proof(monkeypatch, [1], torch.bfloat16):
        assert (choice.what, choice.triton) == ("K in 1 part(s)", where)


def test_ranges_hold_every_height_once_and_each_is_compared_at_its_ends() -> None:
    found = list(proof.ranges(HEIGHTS))
    assert found == [(1, 1), (2, 4), (5, 16), (17, None)]
    assert [proof.compared_heights(low, high, 9) for low, high in found] == [[1], [2, 3, 4], [5, 7, 9], []]


def test_a_proof_is_kept_and_a_broken_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "circumstances", lambda device: {"device": "a stand-in"})
    problem = proof.Problem(8, 8, torch.float16, torch.device("cpu"), True, 0)
    file = tmp_path / "deep" / "proofs.json"
    kept = [proof.Choice(1, None, "00ff", "an algorithm", refused=["another"])]
    proof.keep(file, problem, kept)
    proof.keep(file, proof.Problem(16, 8, torch.float16, torch.device("cpu"), True, 0), [])
    assert proof.read(file) == {str(problem): kept, str(problem).replace("N=8", "N=16"): []}
    file.write_text(file.read_text()[:-20])
    assert proof.read(file) == {} == proof.read(tmp_path / "none")


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch for CUDA brings the headers")
def test_without_headers_or_a_compiler_the_build_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match=r"is not on the PATH: install g\+\+"):
        EXTENSION.load()
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    with pytest.raises(RuntimeError, match=r"cublasLt\.h is in none of .*pip install nvidia-cublas"):
        EXTENSION.load()


def test_a_build_has_another_name_for_another_flag() -> None:
    assert dataclasses.replace(EXTENSION, flags=("-O1",)).name() != EXTENSION.name()


# ---- on a device ----


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(*shape, device="cuda", generator=generator)
    return (x * torch.exp(torch.randn(*shape, device="cuda", generator=generator))).to(dtype)


def triton(name: str) -> Callable[..., Any]:
    from bi_compile.kernels.triton import IMPLEMENTATIONS

    return IMPLEMENTATIONS[name]


def all_same(got: Any, want: Any) -> bool:
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    return all(same_bits(g, w) for g, w in pairs)


class SplitK(proof.CuBlasLt):
    """cuBLASLt with a workspace, its algorithms that split K."""

    def __init__(self) -> None:
        self.workspace = torch.empty(2**25, dtype=torch.uint8, device="cuda")

    def algorithms(self, a: Tensor, b: Tensor, bias: Tensor | None) -> list[Tensor]:
        offered = torch.ops.bi_compile_cuda.algorithms(a, b, bias, self.workspace.nbytes, 64)
        return [x for x in offered if torch.ops.bi_compile_cuda.describe(x)[3] > 1]

    def run(self, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, algorithm: Tensor) -> bool:
        return bool(torch.ops.bi_compile_cuda.run_algorithm(out, a, b, bias, algorithm, self.workspace))


class Halves(proof.CuBlasLt):
    """A kernel with another order: the Triton kernel over each half of K."""

    def run(self, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, algorithm: Tensor) -> bool:
        half = a.shape[1] // 2
        first, second = triton("mm")(a[:, :half], b[:half]), triton("mm")(a[:, half:], b[half:])
        out.copy_(first.float() + second.float())
        return True


@cuda
@pytest.mark.parametrize("library", [SplitK, Halves])
def test_planted_algorithms_are_refused(library: type[proof.CuBlasLt]) -> None:
    ops.load_kernels("cuda")
    problem = proof.Problem(1024, 4096, torch.bfloat16, torch.device("cuda", 0), True, 0)
    choices = proof.prove(problem, (16, 128, 1024), library())
    print(library.__name__, [(c.low, c.high, len(c.refused), c.refused[:1]) for c in choices])
    assert sum(len(c.refused) for c in choices) > 0
    assert all(c.algorithm == "" for c in choices)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1024, 3072), (4096, 1024), (1000, 1352)], ids=str)
def test_a_product_has_the_triton_kernels_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    weight, other = draw(n, k, dtype=dtype), draw(k, n, dtype=dtype, seed=1)
    every = draw(9000, k, dtype=dtype, seed=2)
    bias, addend = draw(n, dtype=dtype, seed=3), draw(9000, n, dtype=dtype, seed=4)
    for m in (1, 2, 7, 8, 17, 31, 65, 100, 129, 257, 300, 513, 1000, 4097, 9000):
        a = every[:m]
        for b in (weight.t(), other):
            assert all_same(ops.mm(a, b), triton("mm")(a, b)), (m, b.stride())
            assert all_same(ops.addmm(bias, a, b), triton("addmm")(bias, a, b)), (m, b.stride())
            assert all_same(ops.addmm(addend[:m], a, b), triton("addmm")(addend[:m], a, b)), (m, b.stride())
    assert all_same(ops.mm(every[5:6], weight.t()), ops.mm(every, weight.t())[5:6])


@cuda
def test_operands_that_cublaslt_cannot_read_and_a_replaced_weight() -> None:
    weight, x = draw(1024, 1024), draw(40, 1032)
    lines = draw(40 * 1024 + 8)
    for a in (
        x[:, :1024],
        x[:, 1:1025],
        lines[1 : 40 * 1024 + 1].view(40, 1024),
        x[:0, :1024],
        x[:1, 3:1027],
        x[:, :1023],
    ):
        b = weight[:, : a.shape[1]].t()
        assert all_same(ops.mm(a, b), triton("mm")(a, b)), (a.shape, a.stride(), a.data_ptr() % 16)
        assert all_same(ops.mm(a, b.contiguous()), triton("mm")(a, b))
    assert all_same(
        ops.addmm(weight[0], x[:, :1024], weight.t(), beta=0.5),
        triton("addmm")(weight[0], x[:, :1024], weight.t(), beta=0.5),
    )
    for seed in (7, 8):
        weight.copy_(draw(1024, 1024, seed=seed))
        assert all_same(ops.mm(x[:, :1024], weight.t()), triton("mm")(x[:, :1024], weight.t()))
    replaced = draw(1024, 1024, seed=9)
    assert all_same(ops.mm(x[:, :1024], replaced.t()), triton("mm")(x[:, :1024], replaced.t()))


@cuda
def test_a_product_without_a_proof_inside_a_graph_is_the_triton_kernels() -> None:
    ops.load_kernels("cuda")
    a, weight = draw(16, 1536), draw(2048, 1536)
    want = triton("mm")(a, weight.t())
    torch.ops.bi_compile_cuda.forget_products()
    for _ in range(2):  # before and after the proof
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ops.mm(a, weight.t())
        graph.replay()
        assert all_same(got, want)
        assert all_same(ops.mm(a, weight.t()), want)


def recorded(name: str, dtype: torch.dtype, seed: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of an operator; the same but for their elements with another seed."""

    def new(*shape: int) -> Tensor:
        return draw(*shape, dtype=dtype, seed=seed + len(shape))

    channels = new(96)
    if name in ("mm", "addmm"):
        for m, n, k in itertools.product((1, 4, 17, 65, 130, 1000), (128, 1000), (1352, 768)):
            a, b = new(m, k), draw(n, k, dtype=dtype, seed=seed).t()
            for each in (b, b.contiguous()):
                for bias in (new(n), new(m, n)):
                    yield ((a, each) if name == "mm" else (bias, a, each)), {}
    elif name in ("bmm", "baddbmm"):
        for b, m, k, n in itertools.product((1, 7), (1, 65), (96, 128), (40, 96)):
            a = new(b, m, k)
            for each in (new(b, k, n), new(b, n, k).mT, *([a.mT] if name == "bmm" else [])):
                yield ((a, each), {}) if name == "bmm" else ((new(m, n), a, each), {"beta": 1 if m == 1 else 0.5})
    elif name == "grouped_mm":
        for counts, groups in ((True, 1), (False, 5)):
            offs = torch.tensor([3, 5, 5, 9, 20][-groups:], dtype=torch.int32, device="cuda")
            yield (new(24, 96), new(groups, 96, 40), offs, new(groups, 40)), {"counts": counts}
    elif name == "scaled_dot_product_attention":
        for length, keys in ((1, 1), (1, 3000), (70, 70), (200, 1500)):
            q, k, v = (
                new(2, 4, length, 64),
                draw(2, 2, keys, 64, dtype=dtype, seed=seed),
                draw(2, 2, keys, 64, dtype=dtype, seed=seed + 1),
            )
            yield (q, k, v, None, True), {}
            yield (q, k, k, new(1, 1, length, keys), False), {"scale": 0.2}
    else:
        for rows in (1, 9):
            x = new(rows, 64, 96)
            more: dict[str, list[tuple[Any, ...]]] = {
                "cumsum": [(-1,), (2,)],
                "logsumexp": [([-1],), ([2], True)],
                "var_mean": [([-1],), ([2], 0, True)],
                "layer_norm": [(channels, None, 1e-5), (None, None, 1e-6)],
                "group_norm": [(new(64), new(64), 4, 1e-5)],
            }
            for rest in more[name]:
                yield (x, *rest), {}


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted({*kernels.RECORDED} - {"mm_segments", "paged_attention"}))
def test_recorded_operators(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as from Python, with other elements elsewhere than in the calls before; Python is not asked again, nor for a
    graph."""
    ops.load_kernels("cuda")
    monkeypatch.setattr(proof, "_prove", lambda problem, heights: [])  # no product is cuBLASLt's
    monkeypatch.setattr(proof, "read", lambda path: {})
    torch.ops.bi_compile_cuda.forget_products()
    ours = getattr(ops, name)
    for first, second in zip(recorded(name, dtype, 0), recorded(name, dtype, 10), strict=True):
        for _ in range(2):
            ours(*first[0], **first[1])
        args, options = second
        want = triton(name)(*args, **options)
        with watching() as seen:
            got = ours(*args, **options)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = ours(*args, **options)
        assert not seen and all_same(got, want), [x.shape for x in args if isinstance(x, Tensor)]
        graph.replay()
        assert all_same(again, want)
    torch.ops.bi_compile_cuda.forget_products()


def layouts(rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    together = draw(rows, 6 * length, dtype=dtype)
    line = draw(rows * length + 8, dtype=dtype)
    return [
        draw(rows, length, dtype=dtype),
        together[:, length : 2 * length],
        together[:, length : 5 * length].view(rows, 4, length),
        draw(2, rows, length, dtype=dtype),
        line[1 : rows * length + 1].view(rows, length),
        draw(length, rows, dtype=dtype).t(),
    ]


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 128, 1000, 9008])
def test_row_operators_have_the_triton_kernels_bits(length: int, dtype: torch.dtype) -> None:
    weight = draw(length, dtype=dtype, seed=5)
    for rows in (3, 1, 0, 37):
        for x in layouts(rows, length, dtype):
            residual = draw(*x.shape, dtype=dtype, seed=6)
            for w in (weight, None, weight.float()):
                assert all_same(ops.rms_norm(x, w, 1e-6), triton("rms_norm")(x, w, 1e-6)), (x.shape, x.stride())
                for r in (residual, x):
                    got, want = ops.add_rms_norm(x, r, w, 1e-5), triton("add_rms_norm")(x, r, w, 1e-5)
                    assert all_same(got, want), (x.shape, x.stride())
            for out in (None, torch.float32):
                for name in ("softmax", "log_softmax"):
                    assert all_same(getattr(ops, name)(x, -1, dtype=out), triton(name)(x, -1, dtype=out)), name
                for name in ("sum", "mean"):
                    for dim, keep in (([-1], False), ([x.dim() - 1], True), ([0], False)):
                        got, want = getattr(ops, name)(x, dim, keep, dtype=out), triton(name)(x, dim, keep, dtype=out)
                        assert all_same(got, want), (name, dim)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_queries_and_keys_have_the_bits_of_two_norms(dtype: torch.dtype) -> None:
    for heads, length in (((16, 8), 128), ((4, 1), 64), ((3, 2), 96)):
        qkv = draw(300, (sum(heads) + heads[1]) * length, dtype=dtype)
        q, k, _ = qkv.unflatten(1, (-1, length)).split([*heads, heads[1]], 1)
        for kind in (dtype, torch.float32):
            ws = [draw(length, dtype=kind, seed=i) for i in (1, 2)]
            want = [ops.rms_norm(x, w, 1e-6)[0] for x, w in zip((q, k), ws, strict=True)]
            for rows in (1, 7, 300, 1, 0):
                got = ops.qk_norm(qkv[:rows], *ws, *heads, 1e-6)
                assert all_same(got, [w[:rows] for w in want]), (heads, length, rows)


@cuda
def test_what_the_c_plus_plus_does_not_take_is_refused_in_the_same_words() -> None:
    x, w = draw(4, 1024), draw(1024, 1024)
    for call, words in (
        (lambda: ops.mm(x, w.float()), "operands of one dtype"),
        (lambda: ops.mm(x, w[:100]), "cannot multiply"),
        (lambda: ops.mm(x.int(), w.int()), "no kernel for torch.int32"),
        (lambda: ops.rms_norm(x, w[0, :5], 1e-6), "weight or bias of 1024 elements"),
        (lambda: ops.add_rms_norm(x, x.float(), None, 1e-6), "one shape and dtype"),
        (lambda: ops.softmax(x.int(), -1), "no kernel for torch.int32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@cuda
def test_gradients_and_compiled_code_pass_through() -> None:
    x, w = draw(8, 1024), draw(1024, 1024)
    compiled = torch.compile(lambda a, b: ops.softmax(ops.rms_norm(ops.mm(a, b.t()), None, 1e-6)[0], -1), dynamic=True)
    want = ops.softmax(ops.rms_norm(ops.mm(x, w.t()), None, 1e-6)[0], -1)
    assert all_same(compiled(x, w), want)
    with torch.inference_mode():
        assert all_same(ops.mm(x, w.t()), triton("mm")(x, w.t()))


def _step(requests: Sequence[tuple[int, int]], page: int, window: int) -> tuple[Any, ...]:
    """A server's step of requests (tokens, keys): what `fill_paged` takes, but for the output."""
    pages = [-(-keys // page) for _, keys in requests]
    k, v = draw(2 * sum(pages), page, 2, 64).chunk(2)
    table = torch.zeros(len(requests), max(pages) + 3, dtype=torch.int32)
    for row, order in zip(table, torch.randperm(sum(pages)).split(pages), strict=True):
        row[: len(order)] = order
    ends = torch.tensor([0, *itertools.accumulate(tokens for tokens, _ in requests)], dtype=torch.int32).cuda()[1:]
    counts = torch.tensor([keys for _, keys in requests], dtype=torch.int32).cuda()
    q = draw(sum(tokens for tokens, _ in requests), 8, 64)
    longest, most = (max(n) for n in zip(*requests, strict=True))
    return q, k, v, ends, counts, table.cuda(), 0.125, window, 0, longest, most


@cuda
@pytest.mark.parametrize("window", [-1, 100])
@pytest.mark.parametrize("page", [16, 64])
def test_a_servers_attention_is_launched_from_cpp(page: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as from Python, for every tile, divided and not; from the second call on Python is not asked."""
    native = kernels.fill_paged()
    cases = [
        [(1, 300)],
        [(1, 5000), (1, 7)],
        [(17, 17)] * 3,
        [(256, 300), (1, 1), (0, 9)],
        [(40, 2100)] * 70,
        [(1, 90)] * 300,
    ]
    for requests in cases * 2:
        q, *rest = _step(requests, page, window)
        want, got = torch.empty_like(q), torch.empty_like(q)
        launches.fill_paged(want, q, *rest)
        native(got, q, *rest)
        assert same_bits(got, want), requests
        got.fill_(torch.nan)
        with monkeypatch.context() as without:
            without.setattr(launches, "paged_attention", None)
            native(got, q, *rest)
        assert same_bits(got, want), requests


@cuda
def test_a_graph_of_a_servers_attention_is_replayed_for_longer_requests() -> None:
    native = kernels.fill_paged()
    q, *rest = _step([(1, 40)] * 3, 16, -1)
    out, want = torch.empty_like(q), torch.empty_like(q)
    native(out, q, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native(out, q, *rest)
    rest[3].copy_(torch.tensor([90, 3, 64]))
    graph.replay()
    native(want, q, *rest[:-1], 90)
    assert same_bits(out, want)


@cuda
def test_a_graph_of_a_servers_attention_is_replayed_for_requests_with_more_queries() -> None:
    """Where the longest is unknown."""
    native = kernels.fill_paged()
    q, *rest = _step([(1, 40)] * 40, 64, -1)
    out, want = torch.empty_like(q), torch.empty_like(q)
    native(out, q, *rest[:-2], 0, rest[-1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native(out, q, *rest[:-2], 0, rest[-1])
    rest[2].copy_(torch.tensor([1, 39, *[40] * 38]))
    graph.replay()
    native(want, q, *rest[:-2], 38, rest[-1])
    assert same_bits(out, want)


@pytest.mark.skipif(CUDA, reason="for machines without CUDA")
def test_importing_the_package_compiles_nothing() -> None:
    code = "import bi_compile.kernels.cuda, sys; assert 'torch.utils.cpp_extension' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
