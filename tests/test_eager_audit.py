"""What runs without a graph is seen, judged and named; what belongs to a graph or to an operator is not judged again."""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import rand
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import bi_compile
from bi_compile import AuditError, OptionError, Options, eager_audit
from bi_compile.audit.report import Verdict
from bi_compile.eager_audit import invariant, judged

X = rand(5, 64)


@pytest.fixture
def mystery() -> Iterator[Callable[[Tensor], Tensor]]:
    library = torch.library.Library("eager_audit_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: (x @ x.t()).sum(0), "CPU")
    yield lambda x: torch.ops.eager_audit_test.mystery(x)
    library._destroy()


def here() -> str:
    """This file and the line below the call."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return f"test_eager_audit.py, line {frame.f_back.f_lineno + 1}, in "


def test_every_operator_has_a_verdict() -> None:
    with torch.no_grad(), invariant(), judged() as seen:
        y = X @ X.t()
        y.softmax(-1).sort().values.add_(1)
        y[:, :3]
    found = {f.operator: f.verdict for f in seen.findings}
    assert found["aten.mm.default"] is found["aten._softmax.default"] is Verdict.REPLACED
    assert found["aten.sort.default"] is Verdict.REPLACED
    assert found["aten.add_.Tensor"] is found["aten.t.default"] is Verdict.ROW_LOCAL
    assert seen.calls["aten.mm.default"] == 1 and not seen.objections
    assert seen.report().counts()["replaced"] == 3


def test_an_unknown_operator_is_an_error_with_its_place_and_the_remedy(mystery: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AuditError, match=r"eager_audit_test.mystery.default unproven") as raised, judged():
        where = here()
        torch.ops.eager_audit_test.mystery(X)
    assert where in str(raised.value) and 'trust={"eager_audit_test::mystery": "the reason"}' in str(raised.value)
    assert _get_current_dispatch_mode() is None


def test_an_unknown_operator_that_is_trusted(mystery: Callable[[Tensor], Tensor]) -> None:
    with judged(Options(trust={"eager_audit_test::mystery": "a test"})) as seen:
        mystery(X)
    assert [(f.operator, f.verdict) for f in seen.findings] == [("eager_audit_test.mystery.default", Verdict.TRUSTED)]


def test_it_is_said_once_where_it_is_not_an_error(mystery: Callable[[Tensor], Tensor]) -> None:
    with (
        pytest.warns(UserWarning, match=r"not batch-invariant: eager_audit_test.mystery.default") as said,
        judged(Options(on_unproven="warn")) as seen,
    ):
        for _ in range(3):
            mystery(X)
    assert len(said) == 1 and seen.calls["eager_audit_test.mystery.default"] == 3 and len(seen.objections) == 1


def test_a_variant_operator_without_the_fallback_is_an_error() -> None:
    with pytest.raises(AuditError, match=r"aten.mm.default variant.*test_eager_audit.py"), judged():
        X @ X.t()
    with pytest.raises(AuditError, match=r"aten.mm.default variant"), invariant(Options(passes=("softmax",))), judged():
        X @ X.t()


def test_random_numbers_are_an_error() -> None:
    with pytest.raises(AuditError, match=r"draws random numbers"), judged():
        F.dropout(X)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_composite_is_judged_by_its_parts(grad: Any) -> None:
    """Under inference_mode it arrives whole, otherwise taken apart."""
    layer = nn.Linear(64, 8)
    with grad(), invariant(), judged() as seen:
        layer(X[None])
    assert seen.calls["aten.addmm.default"] == 1 and "aten.linear.default" not in seen.calls
    with grad(), pytest.raises(AuditError, match=r"aten\.linalg_inv_ex.default"), invariant(), judged():
        torch.linalg.inv(X[:3, :3])


def test_what_a_replacement_calls_is_not_judged() -> None:
    """layer_norm's is written with operators of which the audit knows nothing, outside of bi_compile."""
    with invariant(), judged() as seen:
        F.layer_norm(X, [64])
    assert set(seen.calls) == {"aten.native_layer_norm.default"}


def test_what_a_compiled_graph_calls_is_not_judged() -> None:
    """It has an audit of its own; it is compiled although something watches; what stands between graphs is judged."""

    def f(x: Tensor) -> Tensor:
        y = x @ x.t()
        torch._dynamo.graph_break()
        return y.view(-1)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    g = torch.compile(f, dynamic=True)
    with judged() as seen:
        g(X)
        X.view(-1)
    assert set(seen.calls) == {"aten.view.default"} and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_an_operator_runs_is_judged_where_that_is_asked_for(mystery: Callable[[Tensor], Tensor]) -> None:
    """As in vLLM's operator for a mixture of experts: called by a compiled graph, within a block that only warns."""

    def part(x: Tensor) -> Tensor:
        return mystery(x.relu())

    def operator(x: Tensor) -> Tensor:
        observer = eager_audit.current()
        if observer is None:
            return part(x)
        return eager_audit.judge_within(eager_audit.Observer(Options(), "cpu", observer.seen), part, x)  # type: ignore[no-any-return]

    library = torch.library.Library("eager_audit_opaque", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", operator, "CPU")
    torch.library.register_fake("eager_audit_opaque::opaque", lambda x: x.new_empty(x.shape[0]), lib=library)
    compiled = torch.compile(lambda x: torch.ops.eager_audit_opaque.opaque(x + 1), backend="inductor")
    warning = Options(on_unproven="warn", trust={"eager_audit_opaque::opaque": "its parts are judged"})
    try:
        compiled(X)
        for call in (compiled, torch.ops.eager_audit_opaque.opaque):
            with pytest.raises(AuditError, match=r"eager_audit_test.mystery.default unproven"), judged(warning) as seen:
                call(X)
            assert seen.calls["aten.relu.default"] == 1
    finally:
        library._destroy()


def test_a_write_at_indices_is_judged_as_what_it_calls() -> None:
    where, values = (torch.tensor([0, 1]), torch.tensor([2, 3])), torch.ones(2)
    with torch.no_grad(), invariant(), judged() as seen:
        X.clone()[where] += values
        X.index_put(where, values)
    verdicts = {f.operator: f.verdict for f in seen.findings if "index_put" in f.operator}
    assert verdicts == dict.fromkeys(("aten.index_put_.default", "aten.index_put.default"), Verdict.REPLACED)
    with pytest.raises(AuditError, match=r"aten.index_put_.default variant"), judged():
        X.clone().index_put_(where, values)


def test_a_backward_pass_is_not_judged() -> None:
    """A gradient adds up over the batch by its meaning."""
    layer = nn.Linear(64, 64)
    with invariant(), judged() as seen:
        layer(X).sum().backward()
    assert not seen.objections and layer.weight.grad is not None and "aten.mm.default" not in seen.calls


def test_only_the_thread_that_asked_is_judged() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            F.dropout(X)
        except BaseException as error:
            failed.append(error)

    with judged() as seen:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not failed and not seen.calls


def test_an_option_that_speaks_of_a_graph_is_refused() -> None:
    with pytest.raises(OptionError, match=r"batch is about a graph"), judged(Options(batch={"x": 0})):
        pass


# -- Triton kernels ---------------------------------------------------------------------------------------------------


def launch(name: str, **how: Any) -> None:
    """A launch by way of the class that Triton launches by, which stops where a GPU would be needed."""
    jit = pytest.importorskip("triton.runtime.jit")
    function = object.__new__(jit.JITFunction)
    function.__name__ = name
    with contextlib.suppress(AttributeError):  # it has nothing to run
        function.run(grid=(1,), **{"warmup": False, **how})


def test_a_triton_kernel_is_judged_at_its_launch() -> None:
    launch("planted")
    with pytest.raises(AuditError, match=r"triton.planted unproven.*test_eager_audit.py"), judged():
        launch("planted")
    with judged(Options(trust={"triton.planted": "a test"})) as seen:
        launch("planted")
    assert seen.calls == {"triton.planted": 1}
    launch("planted")


def test_a_triton_kernel_of_an_operator_is_not_judged(mystery: Callable[[Tensor], Tensor]) -> None:
    library = torch.library.Library("eager_audit_test", "FRAGMENT")
    library.define("launching(Tensor x) -> Tensor")
    library.impl("launching", lambda x: (launch("its_own"), x * 2)[1], "CPU")
    with judged(Options(trust={"eager_audit_test::launching": "a test"})) as seen:
        torch.ops.eager_audit_test.launching(X)
    assert set(seen.calls) == {"eager_audit_test.launching.default"}
    library._destroy()


def test_a_kernel_that_is_only_compiled_is_not_judged() -> None:
    with judged() as seen:
        launch("planted", warmup=True)
    assert not seen.calls


def test_nothing_is_left_behind() -> None:
    """Triton's own hook is not used: with one, Inductor would load its kernels with a slow launcher."""
    jit, knobs = pytest.importorskip("triton.runtime.jit"), pytest.importorskip("triton.knobs")
    before, hooks = jit.JITFunction.run, list(knobs.runtime.launch_enter_hook.calls)
    with judged(), judged():
        assert jit.JITFunction.run is not before and knobs.runtime.launch_enter_hook.calls == hooks
    assert jit.JITFunction.run is before and _get_current_dispatch_mode() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.dropout(X)


# -- invariant(audit=True) --------------------------------------------------------------------------------------------


def test_invariant_with_an_audit(mystery: Callable[[Tensor], Tensor]) -> None:
    with bi_compile.invariant(audit=True) as fallback:
        X @ X.t()
    assert fallback.seen is not None and fallback.seen.calls["aten.mm.default"] == 1
    with pytest.raises(AuditError, match=r"mystery"), bi_compile.invariant(audit=True):
        mystery(X)
    with bi_compile.invariant() as fallback:
        assert fallback.seen is None
