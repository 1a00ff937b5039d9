"""The eager fallback: invariant rows, gradients of PyTorch's own, threads, and nothing left behind. What it refuses: test_refused.py."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_cases import NATIVE, OTHER, native, replaced
from support import BATCHES, python, rand, rows_equal, same_bits, tensors
from torch import Tensor

from bi_compile import OptionError, Options, Pass, eager, install, invariant, replaces
from bi_compile.resolve import resolve

Function = Callable[..., Any]


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
    assert same_bits(native(), before) and eager._installed == ()


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
    assert same_bits(native(), before) and eager._installed == ()


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
    original = eager._put_in

    def fails_at_the_tenth(*args: Any) -> None:
        made.append(args)
        if len(made) == 10:
            raise RuntimeError("no kernel today")
        original(*args)

    monkeypatch.setattr(eager, "_put_in", fails_at_the_tenth)
    with pytest.raises(RuntimeError, match="no kernel today"):
        install()
    assert len(made) == 10 and eager._installed == () and same_bits(native(), before)
    monkeypatch.setattr(eager, "_put_in", original)
    with invariant():
        assert replaced()
    assert same_bits(native(), before)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises((OptionError, ValueError), match="'tpu'"):
        install(device="tpu")
    assert eager._installed == ()


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


def test_an_error_within_a_replacement_leaves_the_operator_replaced() -> None:
    with invariant():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                torch.mm(NATIVE, NATIVE)
        assert replaced()


def test_a_replacement_calls_the_native_product_whoever_installs_what(monkeypatch: pytest.MonkeyPatch) -> None:
    other = eager.prepare(Options(), "cpu")
    before = native()[0]

    class Installs(Pass):
        name = "installs"

        @replaces(torch.ops.aten.mm.default, why="a test", source="a test")
        def mm(self: Tensor, mat2: Tensor) -> Tensor:
            with other.installed(), eager.held():
                return torch.mm(self, mat2)

    monkeypatch.setattr(eager, "resolve", lambda options: dataclasses.replace(resolve(options), passes=(Installs,)))
    with invariant():
        assert same_bits(NATIVE @ OTHER, before)
    with other.installed():
        assert replaced()


def test_fallbacks_that_come_and_go_are_each_asked_in_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Names(Pass):
        name = "names"

        @replaces(torch.ops.aten.mm.default, why="a test", source="a test")
        def mm(self: Tensor, mat2: Tensor) -> Tensor:
            return self.new_full((1,), 7)

    ours = eager.prepare(Options(), "cpu")
    monkeypatch.setattr(eager, "resolve", lambda options: dataclasses.replace(resolve(options), passes=(Names,)))
    other = eager.prepare(Options(), "cpu")
    before = native()[0]

    def is_other() -> bool:
        return (NATIVE @ OTHER).shape == (1,)

    for _ in range(2):  # in every order, the same one twice too
        with ours.installed():
            assert replaced()
            with other.installed():
                assert is_other()
                with ours.installed():
                    assert replaced()
                assert is_other()  # the older of the two is gone as well
            assert same_bits(NATIVE @ OTHER, before)
        for fallback in (other, ours, ours, other):
            with fallback.installed():
                assert is_other() if fallback is other else replaced()
            assert same_bits(NATIVE @ OTHER, before)


def test_installing_warns_of_nothing() -> None:
    program = (
        "import bi_compile, torch, warnings; torch.set_warn_always(True); warnings.simplefilter('error'); bi_compile.install(); "
        "print('quiet')"
    )
    assert python(program).strip() == "quiet"


# -- gradients --------------------------------------------------------------------------------------------------------

X = rand(4, 5, 6)
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
    "conv1d": lambda x: (F.conv1d(x, rand(4, x.shape[1], 3)) ** 2).sum(),
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
KERNEL = rand(8, 6, 3, 3, seed=7)
VARIES: dict[str, Function] = {
    "mm": lambda x: x @ WEIGHT.to(x.dtype),
    "mm, columns in memory": lambda x: x @ WEIGHT.to(x.dtype).t().contiguous().t(),
    "addmm": lambda x: torch.addmm(BIAS.to(x.dtype), x, WEIGHT.to(x.dtype)),
    "linear": lambda x: F.linear(x, WEIGHT.to(x.dtype).t(), BIAS.to(x.dtype)),
    "linear of three dimensions": lambda x: F.linear(x.view(-1, 3, 200), WEIGHT[:200].to(x.dtype).t().contiguous()),
    "linear of a transposed batch": lambda x: F.linear(
        x.view(-1, 3, 200).transpose(0, 1), WEIGHT[:200].to(x.dtype).t(), BIAS.to(x.dtype)
    ).transpose(0, 1),
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
    "conv1d": lambda x: F.conv1d(x.view(-1, 6, 100), KERNEL.to(x.dtype)[:, :6, 0], stride=3),
    "conv2d": lambda x: F.conv2d(x.view(-1, 6, 10, 10), KERNEL.to(x.dtype), BIAS[:8].to(x.dtype), padding=1),
    "conv2d of each channel": lambda x: F.conv2d(x.view(-1, 6, 10, 10), KERNEL.to(x.dtype)[:6, :1], groups=6),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x.view(-1, 6, 10, 10), KERNEL.to(x.dtype)[:6], stride=2),
    "avg_pool2d": lambda x: F.avg_pool2d(x.view(-1, 6, 10, 10), 3, 1, 1, count_include_pad=False),
    "max_pool2d": lambda x: F.max_pool2d(x.view(-1, 6, 10, 10), 3, 2, 1),
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


@pytest.mark.parametrize(
    ("layer", "width", "dtype"),
    [
        (torch.nn.GRU, 600, torch.float32),
        (torch.nn.RNN, 600, torch.float32),
        (torch.nn.LSTM, 128, torch.float32),
        (torch.nn.LSTM, 600, torch.bfloat16),
        (torch.nn.GRU, 600, torch.bfloat16),
    ],
    ids=["GRU", "RNN", "LSTM", "LSTM in bfloat16", "GRU in bfloat16"],
)
def test_a_layer_that_runs_step_by_step_has_equal_rows(layer: Any, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = rand(17, 3, width, dtype=dtype)
    with torch.no_grad():
        run = layer(width, 128, 2, batch_first=True, bidirectional=True).to(dtype)
        want = run(x)[0]
        assert (layer is torch.nn.LSTM and dtype == torch.bfloat16) or not rows_equal(
            lambda x: run(x)[0], x, (2, 17)
        ), "no test of anything"
        with invariant():
            got = run(x)[0]
            assert rows_equal(lambda x: run(x)[0], x, (2, 17))
    torch.testing.assert_close(
        got, want, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-4 if dtype == torch.float32 else 3e-2
    )


def test_a_row_does_not_see_its_neighbours() -> None:
    """Not even if they are infinite or no numbers."""
    with invariant():
        for bad in (torch.nan, torch.inf, 3e38):
            x = LONG.clone()
            x[1:] = bad
            for name, f in VARIES.items():
                assert same_bits(tensors(f(x))[0][:1], f(LONG[:1])), (name, bad)


def test_a_number_beside_a_tensor_is_as_precise_as_before() -> None:
    """Within a fallback, and when it has gone; a number has no say in the dtype."""

    def check() -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32):
            for x in (torch.arange(1, 40).to(dtype), torch.tensor(3, dtype=dtype)):
                for f in (torch.add, torch.mul):
                    assert f(x, 3).dtype == dtype and f(x, 0.1).dtype == torch.result_type(x, 0.1)
                    if dtype.itemsize > 2 and dtype.is_floating_point:
                        assert torch.equal(f(x, 0.1), f(x, torch.full_like(x, 0.1)))

    with invariant():
        check()
    check()


# -- threads ----------------------------------------------------------------------------------------------------------

THREADS = """
import itertools, sys, threading, time, torch, bi_compile
import torch.nn.functional as F

x, w, ones = torch.randn(17, 600), torch.randn(600, 40), torch.ones(600)
calls = [
    lambda: x @ w, lambda: x.sum(1), lambda: x.softmax(-1), lambda: F.layer_norm(x, [600], ones, ones),
    lambda: x.logsumexp(-1), lambda: x.sigmoid(), lambda: torch.ops.bi_compile.softmax(x, -1),
]
some = [None, bi_compile.Options(passes=("matmul",)), bi_compile.Options(passes=("softmax", "reductions"))]
plain = [f() for f in calls[:-1]]
begin, found, rounds, failed = threading.Barrier(4), set(), [], []


def bits(y):
    return hash(y.contiguous().numpy().tobytes())


def replaced(f):
    def within(*args):
        with bi_compile.invariant():
            return f(*args)
    return within


def composed(exp, total, log):
    largest = x.amax(1, True)
    return log(total(exp(x - largest), 1)) + largest[:, 0]


def work(k):
    begin.wait()
    stop, n = time.monotonic() + float(sys.argv[1]), 0
    try:
        while time.monotonic() < stop:
            options = some[(n + k) % 3]
            with bi_compile.invariant(options):
                found.add((options is None, *(bits(f()) for f in calls)))
            found.add((False, *(bits(f()) for f in calls)))
            n += 1
        rounds.append(n)
    except BaseException as error:
        failed.append(repr(error))


threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
[t.start() for t in threads], [t.join() for t in threads]  # the first installation is made while others compute
with bi_compile.invariant():
    inside = [f() for f in calls]
elsewhere = [{bits(y)} for y in [*plain, inside[-1]]]
# PyTorch's logsumexp calls other operators, each of which another thread may be replacing meanwhile
elsewhere[4] |= {bits(composed(*fs)) for fs in itertools.product(*((f, replaced(f)) for f in (torch.exp, torch.sum, torch.log)))}
for whole, *values in found:
    for got, want, others in zip(values, inside, elsewhere):
        if not (got == bits(want) or (not whole and got in others)):
            failed.append(whole)
print(sum(rounds), "rounds", file=sys.stderr)
print(failed[:5], sum(rounds) > 4, all(torch.equal(f(), y) for f, y in zip(calls, plain)))
"""


def test_four_threads_enter_leave_and_compute() -> None:
    """No crash; in a scope that replaces everything its values, elsewhere those or PyTorch's, whatever the others do; for logsumexp, which
    PyTorch computes by other operators, those of any of them may be either."""
    assert python(THREADS, "4").strip() == "[] True True"
