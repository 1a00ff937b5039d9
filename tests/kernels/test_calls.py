"""The short way to our operators does what PyTorch's general way does (`bi_compile.kernels.calls`)."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bi_compile import ops
from bi_compile.kernels import calls

OPS = torch.ops.bi_compile
X, W, BIAS = torch.randn(3, 8), torch.randn(8, 4), torch.randn(4)
#: how operators may be called, rightly or wrongly: positional, by name, with defaults, None, numbers of another type
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (OPS.mm.default, (X, W), {}),
    (OPS.mm.default, (X,), {"b": W}),
    (OPS.mm.default, (), {"b": W, "a": X}),
    (OPS.mm.default, (torch.nn.Parameter(X), W), {}),
    (OPS.addmm.default, (BIAS, X, W), {}),
    (OPS.addmm.default, (BIAS, X, W), {"beta": 0.5, "alpha": 3}),
    (OPS.addmm.default, (BIAS, X, W), {"beta": False}),
    (OPS.addmm.default, (BIAS, X, W), {"alpha": torch.tensor(2.0)}),
    (OPS.softmax.default, (X, -1), {}),
    (OPS.softmax.default, (X, 0, torch.float64), {}),
    (OPS.softmax.default, (X, 1), {"dtype": None}),
    (OPS.softmax.default, (X, torch.tensor(1)), {}),
    (OPS.rms_norm.default, (X, None, 1e-6), {}),
    (OPS.rms_norm.default, (X, X[0], 1), {}),
    (OPS.rms_norm.default, (X.half(), X[0], 1e-6), {}),
    (OPS.sum.default, (X, [-1]), {}),
    (OPS.sum.default, (X, (0, 1), True), {}),
    (OPS.sum.default, (X, []), {"dtype": torch.float64}),
    (OPS.sum.default, (X, 1), {}),
    (OPS.sum.default, (X, [True]), {}),
    (OPS.amax.default, (X, [0]), {}),
    (OPS.topk.default, (X, 2), {}),
    (OPS.mm.default, (X,), {}),
    (OPS.mm.default, (X, W, W), {}),
    (OPS.mm.default, (X, None), {}),
    (OPS.mm.default, (X, W), {"b": W}),
    (OPS.mm.default, (X, W), {"c": W}),
    (OPS.mm.default, (X, "w"), {}),
    (OPS.mm.default, (X, X), {}),
    (OPS.mm.default, (X, W.long()), {}),
    (OPS.addmm.default, (BIAS, X, W, 1), {}),
    (OPS.softmax.default, (X, 2**70), {}),
    (OPS.softmax.default, (X, 1.0), {}),
    (OPS.softmax.default, (X, 7), {}),
    (OPS.rms_norm.default, (X, None, True), {}),
    (OPS.sum.default, (X, [0.0]), {}),
    (OPS.sum.default, (X, [2**70]), {}),
]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    ops.load_kernels("cpu")
    assert calls.is_short(OPS.mm.default), calls.state()


def general(op: Any) -> Callable[..., Any]:
    """PyTorch's own way to the operator."""
    return torch._C._jit_get_operation(op._schema.name)[0]


def both(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What each way returns or raises."""
    found = []
    for way in (general(op), op):
        try:
            out = way(*args, **kwargs)
        except Exception as error:
            found.append((type(error), str(error)))
        else:
            outs = out if isinstance(out, tuple) else (out,)
            found.append((type(out), [(o.dtype, o.tolist()) for o in outs]))
    return found


@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0]}-{len(c[1])}-{','.join(c[2])}")
def test_both_ways_are_one(call: Any) -> None:
    theirs, ours = both(*call)
    assert ours == theirs


@pytest.mark.filterwarnings("ignore:bi_compile..mm. an autograd kernel was not registered")
def test_gradients() -> None:
    """The dispatcher's keys for autograd are not passed by: PyTorch says that the operator has no derivative of its own."""
    names = []
    for way in (general(OPS.mm.default), OPS.mm.default):
        out = way(X.clone().requires_grad_(), W)
        names.append((out.requires_grad, out.grad_fn.name()))
        assert not way(X.clone().requires_grad_().detach(), W).requires_grad
    assert names[0] == names[1]


def test_modes_and_subclasses_see_the_operator() -> None:
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **kwargs or {})

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **kwargs or {})

    class Mine(torch.Tensor):
        pass

    for mode in (Functions(), Dispatch()):
        seen.clear()
        with mode:
            OPS.mm.default(X, W)
        assert seen == [OPS.mm.default]
    assert type(OPS.mm.default(X.as_subclass(Mine), W)) is Mine
    with FakeTensorMode() as mode:
        fake = OPS.mm.default(mode.from_tensor(X), mode.from_tensor(W))
        assert type(fake).__name__ == "FakeTensor" and fake.shape == (3, 4)
    assert OPS.mm.default(X.to("meta"), W.to("meta")).device.type == "meta"


def test_an_operator_stays_itself() -> None:
    library = torch.library.Library("bi_compile_test_calls", "FRAGMENT")
    library.define("new(Tensor x) -> Tensor")
    new = torch.ops.bi_compile_test_calls.new.default
    known = {new: 1}
    calls.shorten([new])
    assert calls.is_short(new) and known[new] == 1
    op = OPS.mm.default
    assert copy.deepcopy(op) is op

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(x: Tensor) -> Tensor:
        return ops.mm(x, W) + op(x, W)

    for rows in (3, 5):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x), ops.mm(x, W) * 2)
    assert torch.equal(torch.jit.trace(lambda x: op(x, W), X)(X), op(X, W))


def test_nothing_is_kept() -> None:
    x, dims = torch.randn(3, 8), [0]

    def refused() -> None:
        with pytest.raises(RuntimeError):
            OPS.mm.default(x, x)

    for call in (
        lambda: OPS.sum.default(x, dims, dtype=torch.float16),
        lambda: OPS.add_rms_norm.default(x, x, None, 1e-6),
        refused,
    ):
        call()
        gc.collect()
        before = [sys.getrefcount(o) for o in (x, dims)]
        for _ in range(100):
            call()
        gc.collect()
        assert [sys.getrefcount(o) for o in (x, dims)] == before


def test_without_a_compiler_it_says_so_and_goes_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(calls, "_why_not", "")
    monkeypatch.setattr(calls, "_tried", False)
    monkeypatch.setattr(calls, "_found", None)
    calls.shorten([OPS.mm.default])
    assert "'no-such-compiler' is not on the PATH" in caplog.text
    good, what, found = calls.state()
    assert not good and what == "calls of operators" and "no-such-compiler" in found
    assert calls.redirect(torch.ops.aten.mm.default, "CPU", OPS.mm.default) is None
    with calls.linear():
        calls.own(False)
    assert torch.equal(OPS.mm.default(X, W), general(OPS.mm.default)(X, W))


def test_warnings_of_cpp_go_where_they_go(recwarn: pytest.WarningsRecorder) -> None:
    """Not to Python, where a filter could make an error of them, or bury the error that the call ends with."""
    batch, bad = torch.randn(5, 3, 8), torch.randn(7, 4)
    for way in (general(OPS.addmm.default), OPS.addmm.default):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = torch.vmap(lambda x, way=way: way(BIAS, x, W))(batch)  # warns: there is no rule for a batch
            with pytest.raises(RuntimeError, match="cannot multiply"):
                torch.vmap(lambda x, way=way: way(BIAS, x, bad, beta=True))(batch)
        assert torch.equal(out, torch.stack([OPS.addmm.default(BIAS, x, W) for x in batch]))
    assert not recwarn.list


def test_an_operator_can_be_read_about() -> None:
    assert list(inspect.signature(ops.addmm).parameters) == ["bias", "a", "b", "beta", "alpha"]
    assert "the sums of `mm`" in (ops.addmm.__doc__ or "")


def test_operators_with_other_arguments_are_no_redirection() -> None:
    with pytest.raises(RuntimeError, match="aten::mm and bi_compile::addmm differ in their arguments"):
        calls.redirect(torch.ops.aten.mm.default, "CPU", OPS.addmm.default)
