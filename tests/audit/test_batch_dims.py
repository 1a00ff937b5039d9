"""Where the rows are, and which nodes mix them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import captured, graph_of, judged, knowledge, rand, rewrite_all, traced, traced_rows, verdicts
from torch import Tensor, fx

from bi_compile import OptionError, ops
from bi_compile.audit.batch_dims import batch_dimensions, batch_symbols
from bi_compile.audit.report import audit
from bi_compile.audit.spec import Verdict

aten = torch.ops.aten
ROWS = 6
Function = Callable[..., Any]


def last(graph: fx.Graph) -> fx.Node:
    """The node of the (first) result."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    return output.all_input_nodes[0]


# -- where the rows are -----------------------------------------------------------------------------------------------

X = rand(ROWS, 4, 10)
TOKENS = torch.arange(ROWS)
#: a function of x [6, 4, 10] with rows along 0, and the batch dimensions of its result
FOLLOWED: dict[str, tuple[Function, set[int]]] = {
    "pointwise": (lambda x: x.relu() + 1, {0}),
    "broadcast from the right": (lambda x: torch.ones(3, 1, 1, 10) * x, {1}),
    "merged with the next": (lambda x: x.view(ROWS * 4, 10), {0}),
    "merged with all": (lambda x: x.view(-1), {0}),
    "merged and split again": (lambda x: x.view(ROWS * 4, 10).view(ROWS, 2, 20), {0}),
    "others merged": (lambda x: x.view(ROWS, 40), {0}),
    "others split": (lambda x: x.view(ROWS, 2, 2, 5, 2), {0}),
    "ones put in": (lambda x: x.view(1, ROWS, 1, 40), {1}),
    "unsqueezed": (lambda x: x.unsqueeze(0), {1}),
    "unsqueezed behind": (lambda x: x.unsqueeze(-1), {0}),
    "squeezed": (lambda x: x.unsqueeze(0).squeeze(0), {0}),
    "permuted": (lambda x: x.permute(2, 0, 1), {1}),
    "transposed": (lambda x: x.transpose(0, 2), {2}),
    "t": (lambda x: x.view(ROWS, 40).t(), {1}),
    "summed over another": (lambda x: x.sum(1), {0}),
    "summed and kept": (lambda x: x.sum((1, 2), keepdim=True), {0}),
    "summed behind a transpose": (lambda x: x.transpose(0, 1).sum(0), {0}),
    "maximum": (lambda x: x.transpose(0, 2).amax(0), {1}),
    "mm": (lambda x: x.view(ROWS, 40) @ torch.ones(40, 3), {0}),
    "mm, rows as columns": (lambda x: torch.ones(3, 40) @ x.view(ROWS, 40).t(), {1}),
    "bmm": (lambda x: x @ torch.ones(ROWS, 10, 3), {0}),
    "bmm, rows within": (lambda x: torch.bmm(x.transpose(0, 1), torch.ones(4, 10, 3)), {1}),
    "addmm": (lambda x: torch.addmm(torch.ones(3), x.view(ROWS, 40), torch.ones(40, 3)), {0}),
    "expanded": (lambda x: x.unsqueeze(1).expand(ROWS, 7, 4, 10), {0}),
    "expanded in front": (lambda x: x.expand(3, ROWS, 4, 10), {1}),
    "another dimension selected": (lambda x: x[:, 1], {0}),
    "a row selected": (lambda x: x[2], set()),
    "sliced": (lambda x: x[:, :2], {0}),
    "cat over another": (lambda x: torch.cat([x, x], 1), {0}),
    "cloned": (lambda x: x.clone(), {0}),
    "softmax over another": (lambda x: x.softmax(-1), {0}),
    "forgotten": (lambda x: torch.ones(ROWS, 4), set()),
}


@pytest.mark.parametrize("how", ["named", "symbolic"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_batch_dimension_is_followed(name: str, how: str) -> None:
    """Through views, permutations, reductions, products, selections: by its symbol, or from input to input by name."""
    f, want = FOLLOWED[name]
    if how == "named":
        gm = traced(f, X)
        assert batch_dimensions(gm.graph, {"x_1": 0})[last(gm.graph)] == want
        return
    sizes = f.__code__.co_names
    if "ROWS" in sizes:  # a number in the program is no symbol
        f = _with_symbol(f)
    gm = traced(f, X, dynamic=True)
    assert batch_dimensions(gm.graph)[last(gm.graph)] == want or name == "forgotten"


def _with_symbol(f: Function) -> Function:
    """`f` with the number of rows of its argument in ROWS's place."""

    def g(x: Tensor) -> Any:
        return type(f)(f.__code__, {**f.__globals__, "ROWS": x.shape[0]}, "g", f.__defaults__, f.__closure__)(x)

    return g


def test_rows_come_from_the_tokens_of_an_embedding() -> None:
    gm = traced(lambda ids, w: torch.nn.functional.embedding(ids, w), TOKENS, rand(9, 5))
    assert batch_dimensions(gm.graph, {"ids_1": 0})[last(gm.graph)] == {0}
    assert batch_dimensions(gm.graph, {"w_1": 0})[last(gm.graph)] == set()


def test_two_inputs_with_rows_along_different_dimensions() -> None:
    gm = traced(lambda a, b: a + b.t(), rand(ROWS, 4), rand(4, ROWS))
    assert batch_dimensions(gm.graph, {"a_1": 0, "b_1": -1})[last(gm.graph)] == {0}


def test_the_first_symbolic_dimension_of_an_input_is_the_batch() -> None:
    """A second one (a length) is not."""
    gm, _, _ = graph_of((aten.relu.default, (rand(ROWS, 11, 4),), {}), dynamic=[ROWS, 11])
    (x,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    assert {str(s) for s in batch_symbols(gm.graph)} == {str(x.meta["val"].shape[0])}
    assert batch_dimensions(gm.graph)[x] == {0}


@pytest.mark.parametrize("named", [{"y": 0}, {"x_1": 3}, {"x_1": -4}])
def test_a_batch_dimension_that_does_not_exist_is_refused(named: dict[str, int]) -> None:
    gm = traced(lambda x: x + 1, X)
    with pytest.raises(OptionError, match=r"batch=.*has no input .* with a dimension .*its inputs are x_1"):
        batch_dimensions(gm.graph, named)


# -- rows that are mixed ----------------------------------------------------------------------------------------------

MIXING: dict[str, Function] = {
    "sum": lambda x: x.sum(0),
    "sum of all": lambda x: x.sum(),
    "sum of several": lambda x: x.sum((-1, 0)),
    "mean": lambda x: x.mean(0, keepdim=True),
    "amax": lambda x: x.amax(0),
    "argmax": lambda x: x.argmax(0),
    "var": lambda x: x.var(0),
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(0),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(0)[0],
    "topk": lambda x: x.topk(2, 0)[0],
    "logsumexp": lambda x: x.logsumexp(0),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=0),
    "mm": lambda x: torch.mm(x.t(), x),
    "addmm": lambda x: torch.addmm(x.new_ones(10), x.t(), x),
    "bmm": lambda x: torch.bmm(x.t()[None], x[None]),
    "negative dimension": lambda x: x.sum(-2),
    "behind a transpose": lambda x: x.t().softmax(-1),
    "bi_compile.sum": lambda x: ops.sum(x, [0]),
    "bi_compile.sum of all": lambda x: ops.sum(x, []),
    "bi_compile.mean": lambda x: ops.mean(x, [-2]),
    "bi_compile.softmax": lambda x: ops.softmax(x, 0),
    "bi_compile.log_softmax": lambda x: ops.log_softmax(x, -2),
    "bi_compile.var_mean": lambda x: ops.var_mean(x, [0])[0],
    "bi_compile.logsumexp": lambda x: ops.logsumexp(x, [0]),
    "bi_compile.cumsum": lambda x: ops.cumsum(x, 0),
    "bi_compile.mm": lambda x: ops.mm(x.t(), x),
    "bi_compile.addmm": lambda x: ops.addmm(x.new_ones(10), x.t(), x),
    "bi_compile.bmm": lambda x: ops.bmm(x.t()[None], x[None]),
    "bi_compile.rms_norm": lambda x: ops.rms_norm(x.t(), None, 1e-6)[0],
    "bi_compile.layer_norm": lambda x: ops.layer_norm(x.t(), None, None, 1e-6)[0],
    "bi_compile.add_rms_norm": lambda x: ops.add_rms_norm(x.t(), x.t(), None, 1e-6)[0],
    "bi_compile.group_norm": lambda x: ops.group_norm(x.t()[None], None, None, 2, 1e-6)[0],
}
KEEPING: dict[str, Function] = {
    "sum": lambda x: x.sum(1),
    "sum of a transpose": lambda x: x.t().sum(0),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(-1)[0],
    "mm": lambda x: torch.mm(x, x.new_ones(10, 3)),
    "mm, rows as columns": lambda x: torch.mm(x.new_ones(3, 10), x.t()),
    "addmm": lambda x: torch.addmm(x.new_ones(3), x, x.new_ones(10, 3)),
    "the larger of two": lambda x: torch.maximum(x, x + 1),
    "norms": lambda x: torch.nn.functional.layer_norm(x, [10]),
    "bi_compile.sum": lambda x: ops.sum(x, [1]),
    "bi_compile.softmax": lambda x: ops.softmax(x, -1),
    "bi_compile.mm": lambda x: ops.mm(x, x.new_ones(10, 3)),
    "bi_compile.rms_norm": lambda x: ops.rms_norm(x, None, 1e-6)[0],
    "bi_compile.group_norm": lambda x: ops.group_norm(x, None, None, 2, 1e-6)[0],
}
TABLE = rand(ROWS, 10)


@pytest.mark.parametrize("named", [None, {"x_1": 0}], ids=["symbolic", "named"])
@pytest.mark.parametrize("name", MIXING)
def test_a_reduction_over_the_batch_mixes_rows(name: str, named: dict[str, int] | None) -> None:
    found = [f for f in judged(MIXING[name], TABLE, named=named).findings if f.verdict is Verdict.MIXES_ROWS]
    assert len(found) == 1
    assert (
        "combines the rows along the batch dimension" in found[0].reason
        and "depends on the others by its meaning" in found[0].reason
    )


@pytest.mark.parametrize("named", [None, {"x_1": 0}], ids=["symbolic", "named"])
@pytest.mark.parametrize("name", KEEPING)
def test_a_reduction_over_another_dimension_does_not(name: str, named: dict[str, int] | None) -> None:
    assert Verdict.MIXES_ROWS not in verdicts(judged(KEEPING[name], TABLE, named=named))


def test_a_mean_over_rows_is_found_after_rewriting() -> None:
    """An invariant operator in its place does not make it one."""
    gm = captured(lambda x: x - x.mean(0), TABLE, dynamic=True)
    rewrite_all(gm.graph)
    (objection,) = audit(gm.graph, knowledge()).objections
    assert (objection.operator, objection.verdict) == ("bi_compile.mean.default", Verdict.MIXES_ROWS)


def test_static_shapes_without_a_named_batch_have_no_rows() -> None:
    gm = traced(lambda x: x.sum(0), TABLE)
    assert Verdict.MIXES_ROWS not in verdicts(audit(gm.graph, knowledge()))


#: a function of x [6, 4, 10], and the batch dimensions of its result when x's is 0
THROUGH: dict[str, tuple[Function, set[int]]] = {
    "split in pairs": (lambda x: x.view(3, 2, 40), {0, 1}),
    "merged behind a transpose": (lambda x: x.transpose(0, 1).reshape(24, 10), {0}),
    "and apart again": (lambda x: x.transpose(0, 1).reshape(24, 10).view(4, 6, 10), {1}),
    "merged with the features": (lambda x: x.transpose(0, 1).reshape(4, 60), {1}),
    "repeated": (lambda x: x.repeat(2, 1, 1), {0}),
    "repeated and apart": (lambda x: x.repeat(2, 1, 1).view(2, 6, 4, 10), {1}),
    "windows of rows": (lambda x: x.unfold(0, 2, 1), {0, 3}),
    "windows of features": (lambda x: x.unfold(2, 2, 1), {0}),
    "strides over rows": (lambda x: x.as_strided((5, 80), (40, 1)), {0, 1}),
    "strides within rows": (lambda x: x.as_strided((6, 40), (40, 1)), {0}),
    "a diagonal": (lambda x: x.diagonal(0, 0, 1), {1}),
    "rows picked by number": (lambda x: x[torch.tensor([0, 0, 3])], {0}),
    "rows picked by index_select": (lambda x: x.index_select(0, torch.tensor([1, 2])), {0}),
    "parts": (lambda x: x.split(2, 1)[1], {0}),
    "one of the heads": (lambda x: x.unbind(1)[2], {0}),
    "stacked": (lambda x: torch.stack([x, x], 1), {0}),
    "one behind the other": (lambda x: torch.cat([x, x]), {0}),
    "flipped and padded": (lambda x: torch.nn.functional.pad(x.flip(0), (1, 1)), {0}),
    "gathered": (lambda x: x.gather(2, x.argmax(2, keepdim=True)), {0}),
    "attention": (lambda x: torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), {0}),
}  # fmt: skip


@pytest.mark.parametrize("name", THROUGH)
def test_the_rows_are_followed_through(name: str) -> None:
    f, want = THROUGH[name]
    gm = traced(f, X)
    assert batch_dimensions(gm.graph, {"x_1": 0})[last(gm.graph)] == want


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_view_that_merges_rows_into_the_reduced_dimension(dynamic: bool) -> None:
    def pairs(x: Tensor) -> Tensor:
        return x.view(x.shape[0] // 2, 2, 10).sum(1)

    gm = traced_rows(pairs, TABLE) if dynamic else traced(pairs, TABLE)
    report = audit(gm.graph, knowledge(), None if dynamic else {"x_1": 0})
    assert [o.verdict for o in report.objections] == [Verdict.MIXES_ROWS]


def test_attention_over_rows_mixes_them() -> None:
    """Tokens of all requests in one sequence, each of which sees the others."""

    def attend(x: Tensor) -> Tensor:
        q = x[None, None]
        return ops.scaled_dot_product_attention(q, q, q)[0]

    assert Verdict.MIXES_ROWS in verdicts(judged(attend, TABLE, named={"x_1": 0}))
