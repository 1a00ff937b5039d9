"""The eager fallback: each operator's whole meaning, gradients of PyTorch's own, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import BATCHES, close, python, rand, rows_equal, same_bits, tensors
from torch import Tensor

from bi_compile import OptionError, Options, eager, install, invariant
from bi_compile.table import Table

Function = Callable[..., Any]
NATIVE = rand(17, 600)
OTHER = rand(600, 40, seed=1)


def native() -> list[Tensor]:
    """Bits of PyTorch's own kernels, which differ from the fallback's."""
    return [NATIVE @ OTHER, NATIVE.sum(), NATIVE.sum(1), NATIVE.softmax(-1)]


def replaced() -> bool:
    """Whether the fallback is in place: a product of one row has then the bits that it has among 17."""
    return rows_equal(lambda x: x @ OTHER, NATIVE, (17,))


# -- in and out -------------------------------------------------------------------------------------------------------


def test_within_the_block_and_no_longer() -> None:
    before = native()
    assert not replaced()
    with invariant():
        assert replaced()
        assert not same_bits(native(), before)
    assert same_bits(native(), before) and not replaced()


def test_after_an_exception_the_operators_are_back() -> None:
    before = native()
    with pytest.raises(KeyError), invariant():
        raise KeyError
    assert same_bits(native(), before) and eager._installed == []


def test_nested_and_repeated() -> None:
    before = native()
    with invariant():
        inside = native()
        with invariant(), invariant(Options(passes=("softmax",))):
            assert same_bits(native(), inside)
        assert same_bits(native(), inside) and replaced()
    assert same_bits(native(), before)
    for _ in range(3):
        with invariant():
            assert same_bits(native(), inside)
    assert same_bits(native(), before)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_removed_in_any_order(order: tuple[int, ...]) -> None:
    """As long as one with the product is installed the product is replaced; after the last all is PyTorch's."""
    before = native()
    names = (("matmul",), ("softmax", "reductions"), ("bi_ascend",))
    fallbacks = [install(Options(passes=n)) for n in names]
    for step in range(3):
        fallbacks[order[step]].remove()
        left = set(order[step + 1 :])
        assert replaced() == bool(left & {0, 2})
    assert same_bits(native(), before) and eager._installed == []


def test_removing_twice_does_nothing() -> None:
    before = native()
    first, second = install(), install()
    first.remove()
    first.remove()
    assert replaced()
    second.remove()
    second.remove()
    assert same_bits(native(), before)


def test_only_the_passes_that_were_asked_for() -> None:
    before = native()
    with invariant(Options(passes=("softmax",))) as fallback:
        assert fallback.operators == [
            "aten._log_softmax.default", "aten._log_softmax.out", "aten._safe_softmax.default",
            "aten._softmax.default", "aten._softmax.out",
        ]  # fmt: skip
        assert same_bits(native()[:3], before[:3]) and not replaced()


def test_the_operators_are_named() -> None:
    with invariant() as fallback:
        assert {
            "aten.mm.default",
            "aten.mm.out",
            "aten.sum.IntList_out",
            "aten.addmm_.default",
            "aten.native_layer_norm.default",
        } <= set(fallback.operators)


def test_nothing_is_left_of_an_installation_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    before, made = native(), []
    original = eager._kernel

    def fails_at_the_tenth(*args: Any) -> Any:
        made.append(args)
        if len(made) == 10:
            raise RuntimeError("no kernel today")
        return original(*args)

    monkeypatch.setattr(eager, "_kernel", fails_at_the_tenth)
    with pytest.raises(RuntimeError, match="no kernel today"):
        install()
    assert len(made) == 10 and eager._installed == [] and same_bits(native(), before)
    monkeypatch.setattr(eager, "_kernel", original)
    with invariant():
        assert replaced()
    assert same_bits(native(), before)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises((OptionError, ValueError), match="'tpu'"):
        install(device="tpu")
    assert eager._installed == []


def test_threads() -> None:
    """A thread that was started before and one that was started after see the same, also at the same time."""
    begin, found = threading.Barrier(4), []

    def work() -> None:
        begin.wait()
        found.append(replaced() and all(same_bits(native(), inside) for _ in range(5)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    threads[0].start()
    with invariant():
        inside = native()
        for t in threads[1:]:
            t.start()
        begin.wait()
        for t in threads:
            t.join()
    assert found == [True] * 3


def test_a_replacement_may_call_what_it_replaces() -> None:
    """An operator within its own replacement is the native one: no recursion."""
    from bi_compile import Pass, replaces

    calls = []

    class Counted(Pass):
        name = "counted"

        @replaces(torch.ops.aten.mm.default, why="a test", source="a test")
        def mm(self: Tensor, mat2: Tensor) -> Tensor:
            calls.append(self.shape)
            return torch.mm(self, mat2)

    before = native()[0]
    fallback = eager.EagerFallback(Options(), "cpu")
    fallback.table = Table([Counted], "cpu")
    fallback._install()
    try:
        assert same_bits(NATIVE @ OTHER, before) and calls == [NATIVE.shape]
        assert torch.equal(
            torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64), torch.full((2, 2), 2)
        )
    finally:
        fallback._uninstall()


def test_an_error_within_a_replacement_leaves_the_operator_replaced() -> None:
    with invariant():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                torch.mm(NATIVE, NATIVE)
        assert replaced()


def test_installing_warns_of_nothing() -> None:
    program = "import bi_compile, warnings; warnings.simplefilter('error'); bi_compile.install(); print('quiet')"
    assert python(program).strip() == "quiet"


# -- meaning ----------------------------------------------------------------------------------------------------------

X = rand(4, 5, 6)
INTEGERS = rand(4, 5, 6, dtype=torch.int64)
HALF = rand(4, 5, 6, dtype=torch.bfloat16)
SCALAR = rand()
EMPTY = rand(0, 6)
CALLS: dict[str, Function] = {
    "torch.sum": lambda: torch.sum(X),
    "Tensor.sum": lambda: X.sum(),
    "sum, dim": lambda: X.sum(1),
    "sum, dims": lambda: X.sum((0, -1)),
    "sum, no dims": lambda: X.sum(()),
    "sum, None": lambda: torch.sum(X, dim=None, keepdim=True),
    "sum, keepdim": lambda: X.sum(-1, keepdim=True),
    "sum, dtype": lambda: X.sum(-1, dtype=torch.float64),
    "sum, out": lambda: torch.sum(X, 1, out=torch.empty(0)),
    "sum, out and dtype": lambda: torch.sum(X, 1, dtype=torch.float64, out=torch.empty(4, 6, dtype=torch.float64)),
    "sum of integers": lambda: INTEGERS.sum(1),
    "sum of integers, all": lambda: INTEGERS.sum(),
    "sum of integers as floats": lambda: INTEGERS.sum(1, dtype=torch.float32),
    "sum of booleans": lambda: (X > 0).sum(-1),
    "sum of bytes": lambda: INTEGERS.to(torch.int8).sum(0),
    "sum of halves": lambda: HALF.sum(-1),
    "sum of halves as floats": lambda: HALF.sum(-1, dtype=torch.float32),
    "sum of floats as halves": lambda: X.sum(-1, dtype=torch.bfloat16),
    "sum of floats as integers": lambda: X.sum(-1, dtype=torch.int64),
    "sum of a scalar": lambda: SCALAR.sum(),
    "sum of a scalar, dim": lambda: SCALAR.sum(0),
    "sum of nothing": lambda: EMPTY.sum(),
    "sum of nothing, dim": lambda: EMPTY.sum(0),
    "sum, twice a dim": lambda: X.sum((1, 1)),
    "sum, no such dim": lambda: X.sum(3),
    "sum of complex": lambda: X.to(torch.complex64).sum(1),
    "mean": lambda: X.mean(),
    "mean, dims": lambda: X.mean((0, 2), keepdim=True),
    "mean, dtype": lambda: X.mean(-1, dtype=torch.float64),
    "mean, out": lambda: torch.mean(X, 1, out=torch.empty(0)),
    "mean of integers": lambda: INTEGERS.mean(1),
    "mean of integers as floats": lambda: INTEGERS.mean(1, dtype=torch.float32),
    "mean of halves": lambda: HALF.mean(-1),
    "mean of nothing": lambda: EMPTY.mean(0),
    "nansum": lambda: torch.where(X > 0, X, torch.nan).nansum(-1),
    "var": lambda: X.var(),
    "var, dims": lambda: X.var((0, 1), correction=0),
    "std": lambda: X.std(-1, keepdim=True),
    "var_mean": lambda: torch.var_mean(X, 1),
    "std_mean": lambda: torch.std_mean(X),
    "var of integers": lambda: INTEGERS.var(1),
    "norm": lambda: X.norm(),
    "norm, dims": lambda: torch.norm(X, 2, (0, 1)),
    "vector_norm": lambda: torch.linalg.vector_norm(X, 3, dim=-1),
    "normalize": lambda: F.normalize(X, dim=-1),
    "logsumexp": lambda: X.logsumexp((0, 1)),
    "logsumexp of integers": lambda: INTEGERS.logsumexp(1),
    "cumsum": lambda: X.cumsum(1),
    "cumsum, out": lambda: torch.cumsum(X, 1, out=torch.empty(0)),
    "cumsum in place": lambda: X.clone().cumsum_(1),
    "cumsum of integers": lambda: INTEGERS.cumsum(-1),
    "cumsum of integers as floats": lambda: INTEGERS.cumsum(-1, dtype=torch.float64),
    "softmax": lambda: X.softmax(0),
    "softmax, dtype": lambda: HALF.softmax(-1, dtype=torch.float32),
    "softmax of integers": lambda: INTEGERS.softmax(-1),
    "softmax of integers as floats": lambda: INTEGERS.softmax(-1, dtype=torch.float32),
    "softmax of a scalar": lambda: SCALAR.softmax(0),
    "softmax, no such dim": lambda: X.softmax(3),
    "log_softmax": lambda: F.log_softmax(X, 1),
    "cross_entropy": lambda: F.cross_entropy(X.view(20, 6), torch.arange(20) % 6),
    "mm": lambda: X[0] @ X[1].t(),
    "mm, out": lambda: torch.mm(X[0], X[1].t(), out=torch.empty(5, 5)),
    "mm of integers": lambda: INTEGERS[0] @ INTEGERS[1].t(),
    "mm of halves": lambda: HALF[0] @ HALF[1].t(),
    "mm, no fit": lambda: torch.mm(X[0], X[1]),
    "mm of two dtypes": lambda: torch.mm(X[0], HALF[1].t()),
    "mm of complex": lambda: X[0].to(torch.complex64) @ X[1].t().to(torch.complex64),
    "mm of three dimensions": lambda: torch.mm(X, X),
    "mm of nothing": lambda: EMPTY @ X[0].t(),
    "mm over nothing": lambda: torch.empty(3, 0) @ torch.empty(0, 2),
    "addmm": lambda: torch.addmm(SCALAR, X[0], X[1].t(), beta=2, alpha=0.5),
    "addmm in place": lambda: torch.ones(5, 5).addmm_(X[0], X[1].t()),
    "addmm of integers": lambda: torch.addmm(INTEGERS[0, :, :5], INTEGERS[0], INTEGERS[1].t()),
    "addmm of integers with floats": lambda: torch.addmm(X[0, :, :5], INTEGERS[0], INTEGERS[1].t()),
    "bmm": lambda: torch.bmm(X, X.mT),
    "baddbmm": lambda: torch.baddbmm(X[:, :, :5], X, X.mT),
    "mv": lambda: torch.mv(X[0], X[1, 0]),
    "addmv": lambda: torch.addmv(X[0, :, 0], X[0], X[1, 0]),
    "dot": lambda: torch.dot(X[0, 0], X[1, 0]),
    "dot of integers": lambda: torch.dot(INTEGERS[0, 0], INTEGERS[1, 0]),
    "linear": lambda: F.linear(X, X[0], X[0, :, 0]),
    "linear without bias": lambda: F.linear(X[0, 0], X[1]),
    "matmul": lambda: torch.matmul(X[:, None], X.mT),
    "matmul of vectors": lambda: torch.matmul(X[0, 0], X[1, 0]),
    "einsum": lambda: torch.einsum("bij,bkj->bik", X, X),
    "layer_norm": lambda: F.layer_norm(X, [5, 6], X[0], X[1]),
    "layer_norm of halves beside floats": lambda: torch.native_layer_norm(HALF, [6], X[0, 0], X[0, 1], 1e-5),
    "group_norm": lambda: F.group_norm(X.transpose(1, 2), 3),
    "rms_norm": lambda: F.rms_norm(HALF, [6]),
    "attention": lambda: F.scaled_dot_product_attention(X[None], X[None], X[None], is_causal=True),
    "attention, mask": lambda: F.scaled_dot_product_attention(
        X[None], X[None], X[None], torch.ones(5, 5, dtype=torch.bool).tril()
    ),
}


def outcome(f: Function) -> Any:
    try:
        return f()
    except Exception as error:
        return type(error)


#: PyTorch's complex sums and products have no invariant form
REFUSED = {"sum of complex", "mm of complex"}


@pytest.mark.parametrize("name", CALLS)
def test_it_means_what_pytorchs_means(name: str) -> None:
    """Value within rounding, dtype, shape; and an error where PyTorch gives one."""
    want = outcome(CALLS[name])
    with invariant():
        got = outcome(CALLS[name])
    if name in REFUSED:
        assert isinstance(want, Tensor) and got in (RuntimeError, NotImplementedError)
    elif isinstance(want, type):
        assert isinstance(got, type) and issubclass(got, Exception), got
    else:
        assert not isinstance(got, type), got
        close(got, want)


@pytest.mark.parametrize(
    "name", [n for n in CALLS if "integers" in n and "float" not in n and "softmax" not in n and "log" not in n]
)
def test_integers_have_pytorchs_own_bits(name: str) -> None:
    want = outcome(CALLS[name])
    with invariant():
        got = outcome(CALLS[name])
    assert got is want if isinstance(want, type) else same_bits(got, want)


# -- gradients --------------------------------------------------------------------------------------------------------

W, B = rand(6, 6, seed=3), rand(6, seed=4)
DIFFERENTIABLE: dict[str, Function] = {
    "sum": lambda x: (x.sum(1) ** 2).sum(),
    "mean": lambda x: (x.mean((0, 1)) ** 2).mean(),
    "var": lambda x: x.var(-1).sum() + x.std(0).sum(),
    "norm": lambda x: x.norm(dim=-1).sum(),
    "logsumexp": lambda x: x.logsumexp(-1).sum(),
    "cumsum": lambda x: (x.cumsum(1) ** 2).sum(),
    "softmax": lambda x: (x.softmax(-1) ** 2).sum(),
    "log_softmax": lambda x: (x.log_softmax(0) ** 2).sum(),
    "linear": lambda x: (F.linear(x, W, B) ** 2).sum(),
    "matmul": lambda x: (x @ x.mT).pow(2).sum(),
    "layer_norm": lambda x: (F.layer_norm(x, [6], B, B) ** 3).sum(),
    "group_norm": lambda x: (F.group_norm(x, 5) ** 3).sum(),
    "rms_norm": lambda x: (F.rms_norm(x, [6], B) ** 3).sum(),
    "attention": lambda x: (F.scaled_dot_product_attention(x[None], x[None], x[None]) ** 2).sum(),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_pytorchs(name: str) -> None:
    f = DIFFERENTIABLE[name]
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    f(x).backward()
    with invariant():
        f(y).backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-4)


def test_gradients_are_right() -> None:
    """Against differences, in float64."""
    x = rand(3, 4, dtype=torch.float64).requires_grad_()
    with invariant():
        assert torch.autograd.gradcheck(lambda x: F.layer_norm(x, [4]).softmax(-1) @ x.t(), (x,))
        assert torch.autograd.gradcheck(lambda x: x.logsumexp(-1) + x.var(-1) + x.norm(dim=-1), (x,))


# -- invariance -------------------------------------------------------------------------------------------------------

K = 600
LONG, WEIGHT, BIAS = rand(33, K), rand(K, 40, seed=1), rand(40, seed=2)
HEADS = rand(33, 4, 40, 16, seed=5)
VARIES: dict[str, Function] = {
    "mm": lambda x: x @ WEIGHT.to(x.dtype),
    "mm, columns in memory": lambda x: x @ WEIGHT.to(x.dtype).t().contiguous().t(),
    "addmm": lambda x: torch.addmm(BIAS.to(x.dtype), x, WEIGHT.to(x.dtype)),
    "linear": lambda x: F.linear(x, WEIGHT.to(x.dtype).t(), BIAS.to(x.dtype)),
    "linear of three dimensions": lambda x: F.linear(x.view(-1, 3, 200), WEIGHT[:200].to(x.dtype).t().contiguous()),
    "matmul": lambda x: x.view(-1, 3, 200) @ WEIGHT[:200].to(x.dtype),
    "bmm": lambda x: torch.bmm(x.view(-1, 6, 100), x.view(-1, 6, 100).mT),
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.view(-1, 6, 100).mean((1, 2)),
    "var": lambda x: x.var(-1),
    "norm": lambda x: x.norm(dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, [K], x.new_ones(K), x.new_zeros(K)),
    "group_norm": lambda x: F.group_norm(x.view(-1, 6, 100), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIES)
def test_a_row_has_the_same_bits_in_every_batch(name: str, dtype: torch.dtype) -> None:
    with invariant():
        assert rows_equal(VARIES[name], LONG.to(dtype), BATCHES)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_has_the_same_bits_in_every_batch(causal: bool) -> None:
    with invariant(), torch.no_grad():
        assert rows_equal(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=causal), HEADS, BATCHES)


def test_a_row_does_not_see_its_neighbours() -> None:
    """Not even if they are infinite or no numbers."""
    with invariant():
        for bad in (torch.nan, torch.inf, 3e38):
            x = LONG.clone()
            x[1:] = bad
            for name, f in VARIES.items():
                assert same_bits(tensors(f(x))[0][:1], f(LONG[:1])), (name, bad)
