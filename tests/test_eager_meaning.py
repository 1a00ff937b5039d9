"""The eager fallback keeps each operator's whole meaning: values, dtypes, shapes, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import close, rand, same_bits
from torch import Tensor

from bi_compile import invariant

Function = Callable[..., Any]
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
    "addbmm": lambda: torch.addbmm(X[0, :, :5], X, X.mT, beta=2, alpha=0.5),
    "addbmm of integers": lambda: torch.addbmm(INTEGERS[0, :, :5], INTEGERS, INTEGERS.mT),
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


def test_a_number_is_taken_anew_with_its_type_and_sign() -> None:
    """Numbers are kept between calls: 1, 1.0 and True are three, and so are the zeros."""
    x, whole = torch.tensor([2.0, -3.0]), torch.tensor([2, -3])
    with invariant():
        for _ in range(2):
            assert (
                (whole * 1).dtype == torch.int64
                and (whole * 1.0).dtype == torch.float32
                and (whole * True).dtype == torch.int64
            )
            assert torch.signbit(x * 0.0).tolist() == [False, True] and torch.signbit(x * -0.0).tolist() == [
                True,
                False,
            ]
