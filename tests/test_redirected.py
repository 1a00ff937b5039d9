"""Operators that the eager fallback replaces without Python: when, and with which bits."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_cases import NATIVE, OTHER, native, replaced
from support import python, rand, same_bits
from torch import Tensor

from bi_compile import Options, Pass, eager, invariant, replaces
from bi_compile.measure import pointwise
from bi_compile.resolve import resolve


class Counted(Pass):
    name = "counted"
    calls: list[torch.Size] = []

    @replaces(torch.ops.aten.mm.default, why="a test", source="a test")
    def mm(self: Tensor, mat2: Tensor) -> Tensor:
        Counted.calls.append(self.shape)
        return torch.mm(self, mat2)


def test_a_replacement_may_call_what_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator within its own replacement is the native one: no recursion."""
    monkeypatch.setattr(eager, "resolve", lambda options: dataclasses.replace(resolve(options), passes=(Counted,)))
    before = native()[0]
    with invariant():
        assert same_bits(NATIVE @ OTHER, before) and Counted.calls == [NATIVE.shape]
        assert torch.equal(
            torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64), torch.full((2, 2), 2)
        )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators whose kernel in Python was called and looked for a replacement."""
    found: list[str] = []
    plain = eager._replacement

    def watched(fallbacks: Any, op: Any, device: str) -> Any:
        found.append(str(op))
        return plain(fallbacks, op, device)

    monkeypatch.setattr(eager, "_replacement", watched)
    return found


def test_products_need_no_python(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of floating numbers is handed on by the dispatcher, where the newest fallback replaces it as the table does; for this
    thread alone, and for what is not floating, the kernel in Python decides."""

    def products() -> list[Tensor]:
        asked.clear()
        batch, bias = NATIVE.view(17, 1, 600), rand(40, seed=2)
        out = [
            NATIVE @ OTHER,
            torch.addmm(bias, NATIVE, OTHER, beta=0.5, alpha=2),
            torch.bmm(batch, OTHER.expand(17, -1, -1)),
        ]
        linear = [F.linear(NATIVE, OTHER.t()), F.linear(NATIVE, OTHER.t(), bias)]
        return [*out, torch.baddbmm(bias, batch, OTHER.expand(17, -1, -1), alpha=3), *linear]

    with invariant():
        found = products()
        assert not asked and replaced() and same_bits(found[4], found[0])
        integers = torch.ones(2, 2, dtype=torch.int64)
        assert (integers @ integers).tolist() == [[2, 2], [2, 2]] and asked == ["aten.mm.default"]
        with invariant(Options(passes=("softmax",))):  # replaces no product
            assert same_bits(products(), found) and not asked
        with monkeypatch.context() as other:
            other.setattr(eager, "resolve", lambda options: dataclasses.replace(resolve(options), passes=(Counted,)))
            with invariant():
                assert not same_bits(products(), found) and "aten.mm.default" in asked
        assert same_bits(products(), found) and not asked
    assert not same_bits(products(), found) and not replaced()
    with eager.held(eager.prepare(Options(), "cpu")):
        assert same_bits(products(), found) and "aten.mm.default" in asked
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(replaced()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert not replaced()


def test_sums_and_softmax_need_no_python(asked: list[str]) -> None:
    """Whatever form their dimensions and dtypes have, with the bits that the kernel in Python gives them; that one keeps what is not floating."""
    short, long, count = NATIVE[:, :64], NATIVE.view(17, 20, 30), torch.arange(6).view(2, 3)
    floating: list[Callable[[], Tensor]] = [
        lambda: torch.ops.aten._softmax(short, -1, False),
        lambda: torch.log_softmax(long, 1),
        lambda: torch.softmax(short, 0, dtype=torch.float64),
        lambda: short.bfloat16().softmax(1),
        lambda: long.sum(1),
        lambda: long.sum((0, 2), keepdim=True),
        lambda: torch.sum(long, None),
        lambda: torch.sum(long, [], True),
        lambda: short.bfloat16().sum(-1, dtype=torch.float32),
        lambda: torch.ops.aten.sum.dim_IntList(long, None, True, dtype=torch.float64),
        lambda: long.mean((1, 2)),
        lambda: torch.mean(short.half(), -1, True, dtype=torch.float32),
        lambda: torch.mean(long, None),
        lambda: short.cumsum(-1),
        lambda: short.bfloat16().cumsum(0, dtype=torch.float32),
    ]
    exact: list[tuple[Callable[[], Tensor], Any]] = [
        (lambda: count.sum(1), [3, 12]),
        (lambda: count.sum(1, dtype=torch.float32), [3.0, 12.0]),
        (lambda: (count / 2).sum(0, dtype=torch.int64), [1, 2, 3]),
        (lambda: count.float().cumsum(0, dtype=torch.int32), [[0, 1, 2], [3, 5, 7]]),
        (lambda: count.bool().sum(None), 5),
        (lambda: count.softmax(0, dtype=torch.float32)[0], [0.04742587357759476] * 3),
    ]
    with invariant():
        with eager.held(eager.prepare(Options(), "cpu")):  # for this thread alone, so Python decides
            want = [f() for f in floating]
        asked.clear()
        for f, wanted in zip(floating, want, strict=True):
            found = f()
            assert same_bits(found, wanted) and found.dtype == wanted.dtype and found.shape == wanted.shape
        assert not asked
        for f, values in exact:
            assert f().tolist() == values
        assert set(asked) == {"aten.sum.dim_IntList", "aten.cumsum.default"}
        x = short.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(x.softmax(-1).sum(0).mul(short[0]).mean(0), x)
        assert gradient.shape == x.shape


def test_norms_need_no_python(asked: list[str]) -> None:
    """Over the last dimension, but for statistics that PyTorch rounds on a CPU."""
    x, rows, w = rand(4, 17, 64), rand(17, 128)[:, ::2], rand(64, seed=1)
    norm = torch.ops.aten.native_layer_norm.default
    floating = [
        lambda: norm(x, [64], w, w, 1e-5),
        lambda: norm(rows, [64], None, None, 1e-3),
        lambda: norm(rows.double(), [64], w.double(), None, 1e-5),
        lambda: norm(x[:0], [64], w, None, 1e-5),
        lambda: norm(x[0, 0], [64], w, None, 1e-5),
    ]
    python = [lambda: norm(x.bfloat16(), [64], w, None, 1e-5), lambda: norm(x, [17, 64], None, None, 1e-5)]
    with invariant():
        with eager.held(eager.prepare(Options(), "cpu")):  # for this thread alone, so Python decides
            want = [f() for f in floating + python]
        for i, f in enumerate(floating + python):
            asked.clear()
            found = f()
            assert same_bits(found, want[i])
            assert [(y.dtype, y.shape) for y in found] == [(y.dtype, y.shape) for y in want[i]]
            assert asked == ["aten.native_layer_norm.default"] * (i >= len(floating))
        for y, shape in ((rows, [17]), (rows, [1, 64]), (rows, []), (x[:, :1], [8, 8]), (rows[0, 0], [1])):
            with pytest.raises(RuntimeError):
                norm(y, shape, None, None, 1e-5)
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((F.layer_norm(y, [64], w) ** 2).sum(), y)
        assert gradient.shape == x.shape


def test_a_fused_norm_needs_no_python() -> None:
    """rms_norm on CUDA is one operator; a CPU has no kernel for it, so the program gives it one."""
    program = """
import torch
library = torch.library.Library("aten", "IMPL")
library.impl("_fused_rms_norm", lambda x, shape, weight, eps: (x, x), "CPU")
from bi_compile import eager, invariant, ops
asked, plain = [], eager._replacement
eager._replacement = lambda *given: asked.append(1) or plain(*given)
x, weight = torch.randn(4, 17, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
with invariant():
    asked.clear()
    for eps, default in ((1e-6, 1e-6), (None, torch.finfo(torch.float32).eps)):
        for w in (weight, None):
            found, want = torch.ops.aten._fused_rms_norm(x.float(), [64], w, eps), ops.rms_norm(x.float(), w, default)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            print(len(asked), end=" ")
"""
    assert python(program) == "0 0 1 2 "


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pointwise_functions_need_no_python(asked: list[str], dtype: torch.dtype) -> None:
    """Of floating, contiguous operands of one size, with the bits that the kernel in Python gives them."""
    points = [p for p in pointwise.operators() if p.op in eager._WHOLE]
    assert len(points) > 50
    for shape in ((1, 1), (3, 21), (5, 64), (41, 400), (3, 70_001)):
        for p in points:
            xs = [pointwise.values(*shape, dtype, i + 1) for i in range(p.tensors)]
            with invariant():
                try:
                    with eager.held(eager.prepare(Options(), "cpu")):  # for this thread alone, so Python decides
                        want = p(*xs)
                except NotImplementedError:  # not for every dtype
                    with pytest.raises(NotImplementedError):
                        p(*xs)
                    continue
                asked.clear()
                found = p(*xs)
                assert not asked, p.name
                assert found.shape == want.shape and found.dtype == want.dtype and found.is_contiguous()
                assert pointwise.same_bits(found, want), (p.name, shape)
    x, y = rand(6, 64), rand(6, 1)
    with invariant():
        for f in (lambda: x.t().sigmoid(), lambda: torch.maximum(x, y), lambda: x.long().sigmoid()):
            asked.clear()
            f()
            assert asked
        with pytest.raises(RuntimeError):
            torch.maximum(x, rand(5, 64))
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.silu(z).sum(), z)
        assert gradient.shape == x.shape and not torch.equal(gradient, torch.zeros_like(x))
