"""Bisecting: the first operator whose row differs is named, with its line, in eager code and in the graph that is lowered."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable

import pytest
import torch
from support import rand
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from bi_compile.backend import bi_ascend
from bi_compile.cli import app
from bi_compile.errors import MeasureError
from bi_compile.measure import bisect as measured
from bi_compile.measure.bisect import Bisection, Span, bisect, compare
from bi_compile.measure.record import Call

FIRST, SECOND = rand(1000, 512, seed=1), rand(512, 1000, seed=2)
#: everything but the products
BUT_PRODUCTS = ["softmax", "rms_norm", "layer_norm", "reductions", "pointwise"]
torch._dynamo.register_backend(
    functools.partial(bi_ascend, options={"passes": BUT_PRODUCTS, "on_unproven": "warn"}), name="test_but_products"
)
torch._dynamo.register_backend(
    functools.partial(
        bi_ascend, options={"passes": ["softmax", "matmul"], "trust": {"testlib::half": "a wrong reason"}}
    ),
    name="test_wrong_trust",
)


def inputs() -> Tensor:
    return rand(33, 1000)


def mlp(x: Tensor) -> Tensor:
    y = torch.relu(x)
    y = y @ FIRST  # the line to find
    y = F.relu(y) + 1
    return torch.softmax(y @ SECOND, -1)


@torch.library.custom_op("testlib::half", mutates_args=())
def half(x: Tensor) -> Tensor:
    """Varies with the batch."""
    return x * (0.5 if x.shape[0] == 1 else 0.25)


@half.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def trusting(x: Tensor) -> Tensor:
    return torch.softmax(half(x @ FIRST), -1)


def line_of(fn: Callable[..., Tensor], text: str) -> int:
    lines, start = inspect.getsourcelines(fn)
    return start + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("backend", [None, "inductor", "test_but_products"])
@pytest.mark.filterwarnings("ignore:bi_compile")
def test_the_first_product_is_named_with_its_line(backend: str | None) -> None:
    found = bisect(mlp, (inputs(),), backend=backend, sizes=(1, 2, 17))
    first = found.first
    assert first is not None, "this machine's product no longer varies with the batch"
    assert first.operator in ("aten.mm.default", "aten.matmul.default") and first.difference is not None
    assert f"test_bisect.py, line {line_of(mlp, 'the line to find')}" in first.where
    assert not found.unplaced and not found.unpaired
    after = found.steps[found.steps.index(first) :]
    assert len(after) >= 4 and after[-1].difference is not None, "the difference reaches the output"
    if backend == "test_but_products":
        assert any(s.operator == "bi_compile.softmax.default" for s in after)


def test_an_operator_that_was_trusted_wrongly() -> None:
    """What the audit was told to trust is named, not the replaced operators around it."""
    found = bisect(trusting, (inputs(),), backend="test_wrong_trust", sizes=(1, 2, 17))
    assert found.first is not None and found.first.operator == "testlib.half.default"
    assert f"line {line_of(trusting, 'half(x')}" in found.first.where
    before = found.steps[: found.steps.index(found.first)]
    assert "bi_compile.mm.default" in [s.operator for s in before]


def test_where_nothing_differs_that_is_said() -> None:
    found = bisect(mlp, (inputs(),), backend="bi_ascend", sizes=(1, 2, 17))
    assert found.first is None and found.line() == measured.NOTHING


def test_modules_are_named() -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(1000, 64)).eval()
    found = bisect(model, (inputs(),), sizes=(1, 2, 17))
    assert found.first is not None and found.first.layer == "Linear"


def test_a_backend_without_inductor_is_refused() -> None:
    with pytest.raises(MeasureError, match="hands no graph to Inductor"):
        bisect(mlp, (inputs(),), backend="aot_eager", sizes=(1, 2, 17))


def test_inductor_is_left_as_it_was() -> None:
    from torch._inductor import compile_fx

    before = compile_fx.compile_fx
    bisect(mlp, (inputs(),), backend="inductor", sizes=(1, 2))
    assert compile_fx.compile_fx is before
    torch._dynamo.reset()
    assert torch.compile(mlp, backend="inductor")(inputs()).shape == (33, 1000)


def call(operator: str, *outputs: Tensor) -> Call:
    return Call(operator, "", "", "", list(outputs))


def test_rows_are_placed_by_size() -> None:
    """A part of several elements for each token, one for each request, and what has no rows."""
    spans = [Span(total=10, start=4, length=3), Span(total=4, start=1, length=1)]
    tokens, merged, heads, logits, table = rand(10, 2), rand(20, 2), rand(2, 10, 5), rand(4, 7), rand(6)
    together = [call(n, x) for n, x in zip("abcde", (tokens, merged, heads, logits, table), strict=True)]
    rows = tokens[4:7], merged[8:14], heads[:, 4:7], logits[1:2], table.clone()
    alone = [call(n, x.clone()) for n, x in zip("abcde", rows, strict=True)]
    found = compare(alone, together, spans)
    assert found.first is None and len(found.steps) == 5
    alone[3].outputs[0][0, 2] += 1
    found = compare(alone, together, spans)
    assert found.first is not None and found.first.operator == "d"
    assert found.first.difference is not None and found.first.difference.index == (0, 2)


def test_what_cannot_be_compared_is_said() -> None:
    x = rand(4, 2)
    alone = [call("only_alone", x[:1]), call("square", rand(1, 1)), call("last", x[:1] + 1)]
    together = [call("square", rand(4, 4)), call("only_together", x), call("last", x)]
    found: Bisection = compare(alone, together, [Span(4, 0, 1)])
    assert found.unpaired == ["only_alone", "only_together"] and found.unplaced == ["square"]
    assert found.first is not None and found.first.operator == "last"
    assert all(word in found.line() for word in ("only_alone", "only_together", "square"))


def test_the_command() -> None:
    common = ["--inputs", "tests.measure.test_bisect:inputs"]
    result = CliRunner().invoke(app, ["bisect", "function", "tests.measure.test_bisect:mlp", *common])
    assert result.exit_code == 1 and "the first operator whose row differs is aten.mm.default" in result.output
    equal = CliRunner().invoke(app, ["bisect", "function", "torch:relu", *common])
    assert equal.exit_code == 0 and "no row differs" in equal.output
    as_json = CliRunner().invoke(app, ["bisect", "function", "tests.measure.test_bisect:mlp", *common, "--json"])
    found = json.loads(as_json.stdout)
    assert as_json.exit_code == 1 and found["line"] in result.output and found["mismatch"] in result.output
    first = next(step for step in found["steps"] if step["elements"])
    assert first["operator"] == "aten.mm.default" and first["absolute"] > 0
