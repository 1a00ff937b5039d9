"""Every planted hole is named, nothing else is; and on the adversarial device the holes differ and nothing else does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from holes import CLEAN, HOLES, ROWS, Function, Hole
from support import knowledge, rand, same_bits, traced, traced_rows
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from bi_compile.audit.inputs import BatchInput, batch_inputs
from bi_compile.audit.report import Finding, audit
from bi_compile.audit.spec import ALLOWED, Knowledge
from bi_compile.measure.adversarial import Adversary
from bi_compile.passes import PASSES
from bi_compile.rewrite.fx_utils import held_graphs
from bi_compile.rewrite.splice import rewrite
from bi_compile.table import Table
from bi_compile.targets import get_target

X, W = rand(ROWS, 12), rand(12, 12, seed=1)
#: two rows, so that a function of pairs has one
SOME = slice(2, 4)


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, schema, f in (
            ("somebody", "mystery(Tensor x) -> Tensor", lambda x: x * 2),
            ("bi_compile_too", "mm(Tensor a, Tensor b) -> Tensor", lambda a, b: a @ b),
        ):
            library = torch.library.Library(name, "DEF")
            library.define(schema)
            library.impl(schema.split("(")[0], f, "CompositeExplicitAutograd")
            stack.callback(library._destroy)
        yield


def graphs_of(f: Function, how: str, dynamic: bool) -> list[fx.GraphModule]:
    """`f` as a graph, or as the graphs that Dynamo makes of it."""
    if how == "traced":
        return [traced_rows(f, X, W) if dynamic else traced(f, X, W)]
    graphs: list[fx.GraphModule] = []

    def grab(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    x = X.clone()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.compile(
            f, backend=aot_autograd(fw_compiler=grab, inference_compiler=grab), dynamic=None if dynamic else False
        )(x, W)
    return graphs


def default(gm: fx.GraphModule) -> Sequence[BatchInput]:
    """What the backend takes for the batch where nobody names it."""
    return batch_inputs(gm, [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"])


def objections(f: Function, how: str, dynamic: bool, known: Knowledge) -> list[Finding]:
    return [
        finding
        for gm in graphs_of(f, how, dynamic)
        for finding in audit(gm.graph, known, None if dynamic else default(gm)).objections
    ]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [name for name, hole in HOLES.items() if hole.how != "eager"])
def test_every_hole_is_named_where_nothing_replaces_it(name: str, dynamic: bool) -> None:
    hole = HOLES[name]
    found = objections(hole.f, hole.how, dynamic, knowledge())
    assert any(o.operator.startswith(hole.operator) for o in found), found
    assert all(o.reason and o.verdict not in ALLOWED for o in found)


def device_names(hole: Hole) -> Adversary:
    with Adversary() as device, torch.no_grad():
        hole.f(X, W)
    return device


def test_what_is_in_no_graph_is_named_by_the_device() -> None:
    (hole,) = (hole for hole in HOLES.values() if hole.how == "eager")
    assert list(device_names(hole).perturbed) == ["aten.mm.default"]


def on_the_device(f: Function) -> tuple[Any, Any]:
    """Some rows of a batch, and the same without the others."""
    with Adversary(), torch.no_grad():
        return f(X, W)[SOME], f(X[SOME], W)


HELD = ("cond", "while_loop", "map", "scan along the batch", "flex_attention", "graph break")


@pytest.mark.parametrize("name", [name for name, hole in HOLES.items() if hole.bits and name not in HELD])
def test_the_holes_differ_on_the_adversarial_device(name: str) -> None:
    together, alone = on_the_device(HOLES[name].f)
    assert together.shape == alone.shape and not same_bits(together, alone)


def rewritten(f: Function, how: str = "traced") -> fx.GraphModule:
    """The graph as the pipeline leaves it for a device without a compiler."""
    (gm,) = graphs_of(f, how, dynamic=True)
    table = Table(PASSES, "cpu_eager")
    for p in PASSES:
        for body in (gm, *held_graphs(gm.graph)):
            rewrite(body.graph, table, p.name)
            body.recompile()
    return gm


def eager_knowledge() -> Knowledge:
    table = Table(PASSES, "cpu_eager")
    return Knowledge(get_target("cpu_eager"), table, table, {})


@pytest.mark.parametrize("name", CLEAN)
def test_clean_functions_pass_without_objection_and_keep_their_rows(name: str) -> None:
    gm = rewritten(CLEAN[name])
    assert not audit(gm.graph, eager_knowledge()).objections
    assert same_bits(*on_the_device(gm))


@pytest.mark.parametrize("name", CLEAN)
def test_clean_functions_pass_in_a_static_graph(name: str) -> None:
    gm = traced(CLEAN[name], X, W)
    table = Table(PASSES, "cpu_eager")
    for p in PASSES:
        rewrite(gm.graph, table, p.name)
    assert [(i.position, i.dim) for i in default(gm)] == [(0, 0)]
    assert not audit(gm.graph, eager_knowledge(), default(gm)).objections


@pytest.mark.parametrize("name", [name for name, hole in HOLES.items() if hole.how == "traced"])
def test_a_hole_is_closed_or_still_named(name: str) -> None:
    """With every pass: either the audit objects, or the rows are equal on the device."""
    hole = HOLES[name]
    try:
        gm = rewritten(hole.f)
    except Exception as refused:
        assert type(refused).__name__ == "RewriteError" and hole.operator in str(refused)
        return
    found = audit(gm.graph, eager_knowledge()).objections
    assert found or same_bits(*on_the_device(gm))


def test_there_are_enough() -> None:
    assert len(HOLES) >= 72 and len(CLEAN) >= 62
