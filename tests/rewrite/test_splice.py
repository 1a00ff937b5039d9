"""The graph keeps its meaning, and its values' dtypes, shapes, strides and origins; what cannot be replaced is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import (
    STACK_TRACE,
    Call,
    close,
    graph_of,
    rand,
    rewrite_all,
    run,
    targets,
    traced,
)
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._ops import OpOverload

from bi_compile import Pass, RewriteError, ops, replaces
from bi_compile.rewrite.splice import Tracer, rewrite
from bi_compile.table import Table

aten = torch.ops.aten
#: a size that becomes a symbol
BATCH = 5


def test_origin_is_kept() -> None:
    """Every node that a replacement puts in has the stack trace and module of the one it replaced."""
    x = rand(3, 6, dtype=torch.bfloat16)
    gm, _, _ = graph_of(
        (aten.native_layer_norm.default, (x, [6], None, None, 1e-5), {}), (aten.std.correction, (x, [1]), {})
    )
    changes = rewrite_all(gm.graph)
    new = [n for n in gm.graph.nodes if "bi_compile" in n.meta]
    assert {str(n.target) for n in new} >= {
        "bi_compile.layer_norm.default",
        "bi_compile.var_mean.default",
        "aten.sqrt.default",
    }
    assert all(
        n.meta["stack_trace"] == STACK_TRACE and n.meta["nn_module_stack"] == {"layer": ("layer", "Layer")} for n in new
    )
    assert {c.where for c in changes} == {"model.py, line 7, in forward"}
    assert {n.meta["bi_compile"]["pass"] for n in new} == {"layer_norm", "reductions"}


def test_a_value_is_given_back_in_the_order_of_its_memory() -> None:
    """Attention of PyTorch's CPU kernel lies in memory as [B, L, H, D], so that a program may view it so."""
    q = rand(2, 6, 3, 8).transpose(1, 2)
    gm = traced(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).view(2, 6, 24), q)
    assert len(rewrite_all(gm.graph)) == 1
    close(run(gm, q), torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 6, 24))


def test_a_graph_without_shapes_is_refused_with_the_remedy() -> None:
    gm, _, nodes = graph_of((aten.sum.default, (rand(3, 4),), {}))
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(RewriteError, match=r"x0 \(x0\) carries no shape information.*FakeTensorProp"):
        rewrite_all(gm.graph)
    (call,) = nodes
    call.args = (3.0,)
    with pytest.raises(RewriteError, match=r"the graph carries no shape information.*FakeTensorProp"):
        rewrite(gm.graph, Table([replacing(lambda self, *, dtype=None: self)], "cpu"), "mine")


def replacing(fn: Callable[..., Any], operator: Any = aten.sum.default) -> type[Pass]:
    """A pass with one entry."""
    return type("Mine", (Pass,), {"name": "mine", "fn": replaces(operator, why="a test", source="a test")(fn)})


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda self, *, dtype=None: self.sum(dtype=torch.float64),
            r"output 0 is torch.float32\[\], but the replacement gives torch.float64\[\]",
        ),
        (
            lambda self, *, dtype=None: self.sum(0),
            r"output 0 is torch.float32\[\], but the replacement gives torch.float32\[4\]",
        ),
        (lambda self, *, dtype=None: (self.sum(), self.sum()), r"the operator has 1 outputs, its replacement 2"),
        (lambda self, *, dtype=None: self @ self.t() @ self.t(), r"cannot be traced on torch.float32\[3, 4\]: "),
        (lambda self, *, dtype=None: None, r"output 0 is torch.float32\[\], but the replacement gives None"),
        (lambda self, *, dtype=None: 1.0, r"output 0 is torch.float32\[\], but the replacement gives 1.0"),
    ],
    ids=["dtype", "shape", "count", "fails", "nothing", "number"],
)
def test_a_replacement_that_gives_something_else_is_refused(fn: Callable[..., Any], message: str) -> None:
    """By pass, node, operator and source line."""
    gm, _, _ = graph_of((aten.sum.default, (rand(3, 4),), {}))
    with pytest.raises(
        RewriteError,
        match=r"^pass 'mine', node sum_default \(aten.sum.default, model.py, line 7, in forward\): .*" + message,
    ):
        rewrite(gm.graph, Table([replacing(fn)], "cpu"), "mine")


def test_an_output_too_few_is_refused() -> None:
    gm, _, _ = graph_of((aten.var_mean.correction, (rand(3, 4),), {}))
    mine = replacing(lambda self, dim=None, *, correction=None, keepdim=False: self.sum(), aten.var_mean.correction)
    with pytest.raises(RewriteError, match=r"the operator has 2 outputs, its replacement 1"):
        rewrite(gm.graph, Table([mine], "cpu"), "mine")


def test_a_symbolic_size_that_came_out_as_another_is_refused() -> None:
    gm, _, _ = graph_of((aten.sum.dim_IntList, (rand(BATCH, 4), [1]), {}), dynamic=[BATCH])
    mine = replacing(lambda self, dim, keepdim=False, *, dtype=None: self.sum(0), aten.sum.dim_IntList)
    with pytest.raises(
        RewriteError, match=r"output 0 is torch.float32\[s\d+\], but the replacement gives torch.float32\[4\]"
    ):
        rewrite(gm.graph, Table([mine], "cpu"), "mine")


def test_a_replacement_may_return_its_argument() -> None:
    gm, inputs, _ = graph_of((aten.cumsum.default, (rand(3, 4), 1), {}))
    rewrite(gm.graph, Table([replacing(lambda self, dim, *, dtype=None: self, aten.cumsum.default)], "cpu"), "mine")
    assert targets(gm.graph) == [] and torch.equal(run(gm, *inputs)[0], inputs[0])


def test_a_replacement_that_holds_a_constant_is_refused() -> None:
    """A tensor of values made inside a replacement would belong to the tracer, not to the graph."""
    gm, _, _ = graph_of((aten.cumsum.default, (rand(3, 4), 1), {}))
    mine = replacing(lambda self, dim, *, dtype=None: self * torch.tensor([1.0, 2.0, 3.0, 4.0]), aten.cumsum.default)
    with pytest.raises(
        RewriteError, match=r"holds a tensor of its own, which no graph can carry: make it with torch\.full"
    ):
        rewrite(gm.graph, Table([mine], "cpu"), "mine")


def test_a_replacement_may_make_tensors_of_a_formula() -> None:
    gm, inputs, _ = graph_of((aten.cumsum.default, (rand(3, 4), 1), {}))
    mine = replacing(lambda self, dim, *, dtype=None: self * torch.arange(4) + self.new_ones(4), aten.cumsum.default)
    rewrite(gm.graph, Table([mine], "cpu"), "mine")
    close(run(gm, *inputs), [inputs[0] * torch.arange(4) + 1])


def layers(count: int) -> fx.GraphModule:
    def model(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(count):
            x = x + torch.softmax(torch.nn.functional.layer_norm(x, [8]) @ w, -1)
        return x

    return traced(model, rand(4, 8), rand(8, 8), dynamic=True)


def test_a_replacement_is_traced_once_however_many_layers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the cost of a layer is that of copying a few nodes."""
    traces: list[Any] = []
    original = Tracer.trace
    monkeypatch.setattr(Tracer, "trace", lambda self, *args: traces.append(args) or original(self, *args))
    counts = []
    for count in (3, 12):
        traces.clear()
        gm = layers(count)
        assert len(rewrite_all(gm.graph)) == 3 * count
        counts.append(len(traces))
    assert counts == [3, 3]


def test_different_arguments_are_traced_apart() -> None:
    """1, True and 1.0 are different arguments; so are a dimension and its negative, and two strides."""
    x = rand(4, 4)
    todo: list[Call] = [(aten.sum.dim_IntList, (x, [1], keep), {}) for keep in (False, True)]
    todo += [(aten.var.correction, (x, [1]), {"correction": c}) for c in (1, 0, 2.0, 1.5)]
    todo += [(aten.mm.default, (x, y), {}) for y in (x, x.t())]
    todo += [(aten.addmm.default, (x, x, x), {"beta": b}) for b in (1, 0, 2, 0.5)]
    gm, inputs, _ = graph_of(*todo)
    assert len(rewrite_all(gm.graph)) == len(todo)
    close(run(gm, *inputs), [op(*args, **kwargs) for op, args, kwargs in todo])


def test_one_value_given_twice_is_two_arguments() -> None:
    """What is traced for addmm(x, x, w) serves addmm(y, x, w) too."""

    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(x)
        return torch.addmm(x, x, w), torch.addmm(y, x, w)

    gm, x, w = traced(twice, rand(6, 6), rand(6, 6, seed=1)), rand(6, 6), rand(6, 6, seed=1)
    assert len(rewrite_all(gm.graph)) == 2
    close(run(gm, x, w), list(twice(x, w)))


# ---- operators that write into their arguments ----


def library() -> Iterator[Any]:
    with torch.library._scoped_library("bi_test", "FRAGMENT") as lib:
        lib.define("scale_and_sum(Tensor(a!) x, float by) -> Tensor")
        lib.impl("scale_and_sum", lambda x, by: x.mul_(by).sum(-1), "CompositeExplicitAutograd")
        torch.library.register_fake("bi_test::scale_and_sum", lambda x, by: x.new_empty(x.shape[:-1]), lib=lib)
        yield torch.ops.bi_test.scale_and_sum.default


writes = pytest.fixture(library)


def test_an_operator_that_writes_is_replaced_where_it_was_functionalized(writes: OpOverload) -> None:
    """Its returned values and what it leaves in the argument come out; the argument itself stays as it was."""

    def scale_and_sum(x: Tensor, by: float) -> Tensor:
        x.mul_(by)
        return ops.sum(x, [-1], False)

    x = rand(4, 6)
    want = [writes(left := x.clone(), 3.0), left]
    gm = traced(lambda x: auto_functionalized(writes, x=x, by=3.0), x)
    changes = rewrite(gm.graph, Table([replacing(scale_and_sum, writes)], "cpu"), "mine")
    assert [c.by[-1] for c in changes] and "auto_functionalized" not in str(gm.graph)
    assert all(not n.target._schema.is_mutable for n in gm.graph.nodes if isinstance(n.target, OpOverload))
    before = x.clone()
    close(run(gm, x), want)
    assert torch.equal(x, before)


def test_a_functionalized_operator_stays_where_its_entry_says_so(writes: OpOverload) -> None:
    entry = replaces(writes, why="a test", source="a test", unless=lambda x, by: by == 1)(lambda x, by: x.sum(-1))
    mine = type("Mine", (Pass,), {"name": "mine", "fn": entry})
    gm = traced(lambda x: auto_functionalized(writes, x=x, by=1.0), rand(4, 6))
    assert rewrite(gm.graph, Table([mine], "cpu"), "mine") == []
