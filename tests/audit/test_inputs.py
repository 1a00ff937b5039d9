"""Which dimension of which input the backend takes for the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support import rand
from torch import Tensor, nn

import bi_compile  # noqa: F401 - its operators
from bi_compile import OptionError
from bi_compile.audit.inputs import batch_inputs

Found = list[list[tuple[str, int, int]]]


def found(f: Any, *args: Any, dynamic: bool = False, named: Mapping[str, int] | None = None, **kwargs: Any) -> Found:
    """(name, dimension, elements of each row) for each graph that Dynamo makes of a call."""
    graphs: Found = []

    def backend(gm: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append([(i.name, i.dim, i.per_row) for i in batch_inputs(gm, inputs, named)])
        return gm.forward  # type: ignore[no-any-return]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return graphs


X = rand(6, 9, 32)
#: the arguments of a call, and the inputs that carry the batch
CALLS: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "one": ((X,), ["a"]),
    "tokens, mask and keys": ((torch.ones(6, 9), torch.ones(6, 1, 9, 9), rand(6, 2, 7, 4)), ["a", "b", "c"]),
    "positions": ((X, torch.arange(9)), ["a"]),
    "positions of all": ((X, torch.arange(9)[None]), ["a"]),
    "labels": ((X, torch.arange(6)), ["a", "b"]),
    "a scalar": ((X, torch.tensor(3.0)), ["a"]),
    "scalars only": ((torch.tensor(3.0),), []),
    "a causal mask": ((X, torch.ones(9, 9)), ["a"]),
    "a weight": ((rand(6, 12), rand(12, 5)), ["a"]),
    "a batch of one": ((X[:1], torch.arange(9)), []),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_batch_is_dimension_0_of_the_inputs_of_its_size(name: str) -> None:
    args, want = CALLS[name]

    def f(a: Tensor, b: Any = None, c: Any = None) -> Any:
        return [x + 1 for x in (a, b, c) if x is not None]

    assert found(f, *args) == [[(n, 0, 1) for n in want]]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_batch_as_long_as_its_sequences_is_told_apart_by_the_input(dynamic: bool) -> None:
    """torch.compile gives the two one symbol."""
    assert found(lambda x: x + 1, rand(5, 5, 4), dynamic=dynamic) == [[("x", 0, 1)]]


def test_what_a_module_or_a_closure_holds_is_no_input() -> None:
    table = rand(40, 32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 40)
            self.register_buffer("scale", rand(40))

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) * self.scale + x @ table.t()

    assert found(Model(), X) == [[("x", 0, 1)]]


def test_rows_that_were_merged_with_their_length() -> None:
    assert found(lambda a, b: (a + 1, b + 1), X, rand(54, 8)) == [[("a", 0, 1), ("b", 0, 9)]]


def test_keyword_arguments_go_by_their_names() -> None:
    def f(**kwargs: Any) -> Any:
        return kwargs["ids"] + 1

    assert found(f, ids=X) == [[("ids", 0, 1)]]


def test_each_graph_of_a_graph_break_has_its_batch() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.relu()
        torch._dynamo.graph_break()
        return y + 1

    assert found(f, X) == [[("x", 0, 1)], [("y", 0, 1)]]


def test_a_named_dimension_takes_the_place_of_the_rule() -> None:
    assert found(lambda x, y: (x + 1, y + 1), X, rand(7, 6), named={"x": -2}) == [[("x", 1, 1)]]
    assert found(lambda x: x + 1, X, named={}) == [[]]


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((X, rand(7, 32)), None, r"its size differs: a \[6, 9, 32\], b \[7, 32\]; name .* as in batch=\{'a': 0\}"),
        ((X, rand(2, 6, 32)), None, "its size differs"),
        ((X, X[:2]), {"x": 0}, r"has none of these inputs; it has a \[6, 9, 32\], b"),
        ((X, X[:2]), {"a": 3}, r"the input a \[6, 9, 32\] has no dimension 3"),
        ((torch.tensor(3.0), X), {"a": 0}, r"the input a \[\] has no dimension 0"),
    ],
)
def test_what_is_not_known_is_a_sentence(args: Any, named: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        found(lambda a, b: (a + 1, b + 1), *args, named=named)
    assert isinstance(raised.value, OptionError) or isinstance(
        getattr(raised.value, "inner_exception", raised.value.__cause__), OptionError
    )
