"""A verdict with its reason on every node, and what is done about it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import captured, graph_of, judged, knowledge, pipeline, rand, rewrite_all, traced, verdicts
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from bi_compile import AuditError
from bi_compile.audit.report import Finding, Report, audit
from bi_compile.audit.spec import Verdict
from bi_compile.passes import Matmul, Softmax

aten = torch.ops.aten
ROWS = 6
X, TABLE = rand(ROWS, 4, 10), rand(ROWS, 10)
Function = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """Operators of a library of somebody's."""
    library = torch.library.Library("somebody", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.define("fill(Tensor(a!) x) -> ()")
    library.impl("mystery", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("fill", lambda x: None, "CompositeExplicitAutograd")
    yield
    library._destroy()


def of(report: Report, operator: str) -> Finding:
    (found,) = [f for f in report.findings if f.operator == operator]
    return found


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.relu(x) * 2 + x.abs(),
        lambda x: x.transpose(0, 1).reshape(-1)[2:].view(-1, 2),
        lambda x: torch.cat([x, x.new_zeros(x.shape)]).clone(),
        lambda x: x.argmin(-1) + x.argmax(-1) + x.sort(dim=-1, stable=True)[0][:, 0],
        lambda x: x[torch.arange(3)],
        lambda x: torch.where(x > 0, x, x.to(torch.float64)),
        lambda x: x.masked_fill(x > 1, 0.0).tril(),
        lambda x: x.to(torch.int64).sum(-1),
    ],
)
def test_pointwise_views_and_moves_are_row_local(f: Function) -> None:
    report = judged(f, TABLE)
    assert set(verdicts(report)) == {Verdict.ROW_LOCAL} and not report.objections


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.ops.prims.sum(x, [1]),
        lambda x: torch.ops.prims.var(x, [1], 1),
        lambda x: torch.ops.prims.prod(x, [1]),
        lambda x: torch.ops.prims.fft_r2c(x, dim=[1], onesided=True),
        lambda x: torch.cumprod(x, 1),
        lambda x: torch.prod(x, 1),
        lambda x: torch.fft.rfft(x),
        lambda x: torch.linalg.inv(x @ x.t()),
    ],
    ids=["prims.sum", "prims.var", "prims.prod", "prims.fft", "cumprod", "prod", "fft", "inverse"],
)
def test_what_adds_up_and_stands_in_no_table_is_unproven(f: Function) -> None:
    report = judged(f, TABLE, dynamic=False)
    assert Verdict.UNPROVEN in verdicts(report)


def test_a_primitive_that_is_pointwise_is_row_local() -> None:
    report = judged(
        lambda x: torch.ops.prims.mul(torch.ops.prims.exp(x), torch.ops.prims.sqrt(x)), TABLE, dynamic=False
    )
    assert set(verdicts(report)) == {Verdict.ROW_LOCAL}


def test_an_unknown_operator_is_unproven_with_name_line_and_remedy() -> None:
    gm, _, _ = graph_of((torch.ops.somebody.mystery.default, (TABLE,), {}))
    report = audit(gm.graph, knowledge())
    (objection,) = report.objections
    assert objection.verdict is Verdict.UNPROVEN and objection.where == "model.py, line 7, in forward"
    assert "nothing is known about somebody.mystery.default" in objection.reason
    assert (
        'trust={"somebody::mystery": "the reason"}' in objection.reason
        and "replace it in a pass of yours" in objection.reason
    )
    with pytest.raises(
        AuditError,
        match=r"not known to be batch-invariant:\n  mystery_default \(somebody.mystery.default\) unproven: .*model.py",
    ):
        report.raise_objections()


@pytest.mark.parametrize("name", ["somebody::mystery", "somebody.mystery.default"])
def test_a_trusted_operator_keeps_its_reason(name: str) -> None:
    report = judged(lambda x: torch.ops.somebody.mystery(x), TABLE, trust={name: "it doubles"})
    finding = of(report, "somebody.mystery.default")
    assert (finding.verdict, finding.reason) == (Verdict.TRUSTED, "it doubles") and not report.objections


def test_trust_reaches_no_other_operator() -> None:
    report = judged(
        lambda x: torch.ops.somebody.mystery(x).cumprod(1),
        TABLE,
        trust={"somebody::mystery": "it doubles", "aten::cumpro": "no"},
    )
    assert [f.operator for f in report.objections] == ["aten.cumprod.default"]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.rand_like(x),
        lambda x: torch.bernoulli(x.abs().clamp(0, 1)),
        lambda x: torch.nn.functional.dropout(x, 0.5, True),
        lambda x: torch.multinomial(x.abs(), 1),
        lambda x: torch.randn(x.shape),
        lambda x: x + torch.ops.prims.inductor_random([3, 4], torch.ops.prims.inductor_seed(x.device), "rand").sum(),
    ],
    ids=["rand_like", "bernoulli", "dropout", "multinomial", "randn", "inductor_random"],
)
def test_random_numbers_are_unproven(f: Function) -> None:
    import torch._inductor.inductor_prims  # noqa: F401 - registers inductor_random

    objections = judged(f, TABLE, dynamic=False).objections
    assert any(o.verdict is Verdict.UNPROVEN and "draws random numbers" in o.reason for o in objections)


def _put(x: Tensor, index: Tensor, values: Tensor, *, accumulate: bool) -> Tensor:
    return torch.index_put(x, (index,), values, accumulate)


def test_writes_that_add_up_are_unproven_and_others_are_replaced() -> None:
    index, values = torch.tensor([0, 0, 2]), rand(3, 10)
    for accumulate, want in ((True, Verdict.UNPROVEN), (False, Verdict.VARIANT)):
        write = functools.partial(_put, accumulate=accumulate)
        report = judged(write, TABLE, index, values, dynamic=False)
        assert of(report, "aten.index_put.default").verdict is want


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.index_add(x, 0, torch.tensor([0, 0]), x[:2]),
        lambda x: torch.scatter_add(x, 0, torch.zeros(2, 10, dtype=torch.int64), x[:2]),
        lambda x: torch.scatter_reduce(x, 0, torch.zeros(2, 10, dtype=torch.int64), x[:2], "sum"),
        lambda x: torch.scatter(x, 0, torch.zeros(2, 10, dtype=torch.int64), x[:2], reduce="add"),
    ],
    ids=["index_add", "scatter_add", "scatter_reduce", "scatter reduce"],
)
def test_scatters_that_add_up_are_unproven(f: Function) -> None:
    assert [o.verdict for o in judged(f, TABLE, dynamic=False).objections] == [Verdict.UNPROVEN]


def test_a_variant_operator_names_the_pass_to_add() -> None:
    gm = traced(lambda x: x.softmax(-1) @ x.t(), TABLE)
    rewrite_all(gm.graph, Matmul)
    report = audit(gm.graph, knowledge(Matmul))
    (objection,) = report.objections
    assert (objection.operator, objection.verdict) == ("aten._softmax.default", Verdict.VARIANT)
    assert objection.reason.endswith("add the pass 'softmax'")
    assert of(report, "bi_compile.mm.default").verdict is Verdict.REPLACED


def test_an_operator_that_a_pass_should_have_replaced_is_variant() -> None:
    gm = traced(lambda x: x.softmax(-1), TABLE)
    (objection,) = audit(gm.graph, knowledge(Softmax)).objections
    assert objection.reason.endswith("the pass 'softmax' should have replaced it")


def test_exact_sums_are_row_local() -> None:
    report = judged(lambda x: x.long().sum(1) + (x.long() @ x.long().t())[:, 0], TABLE, dynamic=False)
    assert not report.objections and of(report, "aten.mm.default").reason == "exact for these arguments in every order"


def test_a_rewritten_model_has_no_objections() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        h = torch.nn.functional.layer_norm(torch.nn.functional.linear(x, w), [10])
        q = h.view(-1, 2, 1, 5)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).flatten(1).softmax(-1)

    gm = captured(model, TABLE, rand(10, 10), dynamic=True)
    rewrite_all(gm.graph)
    report = audit(gm.graph, knowledge())
    assert not report.objections, report.objections
    assert report.counts()["replaced"] == 4


def test_higher_order_operators() -> None:
    """A mutable operator made functional is judged by its own name, a graph within a graph by itself."""
    from torch._higher_order_ops.auto_functionalize import auto_functionalized

    def call(target: Any, *args: Any) -> fx.Graph:
        graph = fx.Graph()
        x = graph.placeholder("x")
        with torch._subclasses.FakeTensorMode() as mode:
            x.meta["val"] = mode.from_tensor(TABLE)
        node = graph.call_function(target, args, {"x": x} if target is auto_functionalized else {})
        node.meta["val"] = (x.meta["val"],)
        graph.output(node)
        return graph

    fill = torch.ops.somebody.fill.default
    (unproven,) = audit(call(auto_functionalized, fill), knowledge()).objections
    assert unproven.verdict is Verdict.UNPROVEN and "somebody::fill" in unproven.reason
    assert not audit(call(auto_functionalized, fill), knowledge(trust={"somebody::fill": "fills"})).objections
    # without a graph that can be read, and where nobody knows what is done with it
    for operator in (torch.ops.higher_order.cond, torch.ops.higher_order.associative_scan):
        (unproven,) = audit(call(operator), knowledge()).objections
        assert unproven.verdict is Verdict.UNPROVEN and operator.name() in unproven.reason


def within(x: Tensor, w: Tensor) -> Any:
    """Graphs within the graph, each with an operator that a pass replaces."""
    loop = while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, y @ w), (torch.zeros((), dtype=torch.int64), x))
    return (
        torch.cond(w[0, 0] > 0, lambda x: x.softmax(-1), lambda x: x * 2, (x,)),
        loop[1],
        torch._higher_order_ops.map(lambda row, w: row.sum() + w, x, w[0]),
        scan(lambda c, column: (c + column, column * c), x[:, 0].clone(), x.t().contiguous())[1],
    )


def compiled_graph(f: Function, x: Tensor, w: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def grab(gm: fx.GraphModule, _: Any) -> Function:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.compile(f, backend=aot_autograd(fw_compiler=grab, inference_compiler=grab))(x, w)
    (gm,) = graphs
    return gm


def test_graphs_within_the_graph_are_followed_judged_and_rewritten() -> None:
    gm = compiled_graph(within, rand(ROWS, 10), rand(10, 10))
    found = {f.node.split("/")[0]: f for f in audit(gm.graph, knowledge()).objections}
    assert {k: f.operator for k, f in found.items()} == {
        "cond": "aten._softmax.default", "while_loop": "aten.mm.default", "map_impl": "aten.sum.default",
    }  # fmt: skip
    assert all(f.verdict is Verdict.VARIANT and "/" in f.node for f in found.values())
    done = pipeline(inner="eager")
    with torch.no_grad():
        x, w = X[:, 0].contiguous(), rand(10, 10)
        want = within(x, w)
        changes = done.rewrite(gm.graph, "captured")
        assert {"aten._softmax.default", "aten.mm.default", "aten.sum.default"} <= {c.operator for c in changes}
        report = done.audit(gm.graph)
        assert not report.objections
        inputs = [X.shape[0] if "Sym" in str(n.meta["val"]) or not isinstance(n.meta["val"], Tensor) else
                  x if not isinstance(n.meta["val"].shape[0], int) else w
                  for n in gm.graph.nodes if n.op == "placeholder"]  # fmt: skip
        for have, right in zip(gm(*inputs), want, strict=True):
            torch.testing.assert_close(have, right, rtol=1e-4, atol=1e-4)


def test_rows_that_a_loop_mixes_are_found() -> None:
    """In the graph that it holds; and where it scans along them."""

    def mixing(x: Tensor, w: Tensor) -> Any:
        y = while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, y - y.amax(0)), (torch.zeros((), dtype=torch.int64), x))
        return y[1], scan(lambda c, row: (c + row, row * c), w[0].clone(), x)[1]

    gm = compiled_graph(mixing, rand(ROWS, 10), rand(10, 10))
    found = [f for f in audit(gm.graph, knowledge()).objections if f.verdict is Verdict.MIXES_ROWS]
    assert [f.operator for f in found] == ["aten.amax.default", "scan"]
    assert found[0].node.startswith("while_loop/while_loop_body_graph_0/") and "scans the rows" in found[1].reason


def test_a_triton_kernel_is_named_by_its_name() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    def my_kernel() -> None: ...

    graph = fx.Graph()
    x = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode() as mode:
        x.meta["val"] = mode.from_tensor(TABLE)
    held = {"kernel_idx": kernel_side_table.add_kernel(my_kernel), "kwargs": {"x": x}, "grid": [(1,)]}
    node = graph.call_function(triton_kernel_wrapper_functional, (), held)
    node.meta["val"] = {"x": x.meta["val"]}
    graph.output(node)
    (objection,) = audit(graph, knowledge()).objections
    assert objection.operator == "triton.my_kernel" and 'trust={"triton::my_kernel"' in objection.reason
    assert not audit(graph, knowledge(trust={"triton::my_kernel": "one program for each row"})).objections


def test_an_audit_changes_nothing() -> None:
    gm = captured(lambda x: x.softmax(-1) @ x.t(), TABLE, dynamic=True)
    before = (str(gm.graph), [dict(n.meta) for n in gm.graph.nodes])
    audit(gm.graph, knowledge())
    audit(gm.graph, knowledge(Matmul), {"arg0_1": 0} if "arg0_1" in str(gm.graph) else None)
    assert (str(gm.graph), [dict(n.meta) for n in gm.graph.nodes]) == before


def test_a_report_lists_every_node() -> None:
    gm = captured(lambda x: x.softmax(-1), TABLE)
    report = audit(gm.graph, knowledge())
    data = report.to_json()
    assert [n["node"] for n in data["nodes"]] == [n.name for n in gm.graph.nodes]
    assert sum(data["counts"].values()) == len(data["nodes"]) and data["target"] == "cpu"
    assert all(n["reason"] for n in data["nodes"])


# -- what is done about it --------------------------------------------------------------------------------------------


def two_unknowns() -> fx.GraphModule:
    return traced(lambda x: torch.ops.somebody.mystery(torch.ops.somebody.mystery(x)).cumprod(1), TABLE)


def test_error_lists_every_objection() -> None:
    with pytest.raises(AuditError) as error:
        pipeline(on_unproven="error").audit(two_unknowns().graph)
    assert str(error.value).count("nothing is known about somebody.mystery.default") == 2
    assert str(error.value).count("nothing is known about aten.cumprod.default") == 1


def test_warn_says_it_once_for_each_operator() -> None:
    done = pipeline(on_unproven="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            report = done.audit(two_unknowns().graph)
    said = [str(w.message) for w in caught if "not batch-invariant" in str(w.message)]
    assert len(report.objections) == 3
    assert sorted(s.split("(")[1].split(")")[0] for s in said) == ["aten.cumprod.default", "somebody.mystery.default"]


def test_the_summary_counts_what_was_left() -> None:
    done = pipeline(on_unproven="warn", trust={"aten::cumprod": "one by one"})
    gm = two_unknowns()
    with pytest.warns(UserWarning, match="somebody.mystery"):
        done.audit(gm.graph)
    assert done.summary.left == {"somebody.mystery.default": 2} and done.summary.trusted == {
        "aten.cumprod.default": "one by one"
    }
    assert "left 2 somebody.mystery.default" in done.summary.line() and "1 graphs" in done.summary.line()
