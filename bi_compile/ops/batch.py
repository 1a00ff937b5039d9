"""How the batch flows through an operator, said where its schema stands: `@operator("mm(…) -> Tensor", batch=Product("a", "b"))`.

Each is a plain value; the audit (`bi_compile.audit.batch_rules`) gives it its meaning. An argument is called by its name in
the schema. "Combined" is a dimension whose elements make one value: where it holds rows, the operator mixes rows.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """The tensors are broadcast together and meet element by element; nothing is combined."""


@dataclasses.dataclass(frozen=True)
class Reduces:
    """The dimensions that the argument `dim` names (empty: all) are combined, and gone or of size 1."""

    dim: str


@dataclasses.dataclass(frozen=True)
class Along:
    """The dimension that the argument `dim` names is combined, and stays: softmax, cumsum."""

    dim: str


@dataclasses.dataclass(frozen=True)
class Product:
    """`a` [..., M, K] by `b` [..., K, N]: K is combined; what else there is, is broadcast to the result [..., M, N]."""

    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class TransposedProduct:
    """`a` [B, M, K] by `b` [B, K, N]: K is combined; the result is [M, B, N]."""

    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class GroupedProduct:
    """`a` [M, K], each row by its group's matrix of `b` [G, K, N]: K is combined; the result is [M, N]."""

    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class Attention:
    """`query` [..., L, D], `key` [..., S, D], `value` [..., S, Dv]: D and S are combined; the results begin with [..., L]."""

    query: str
    key: str
    value: str


@dataclasses.dataclass(frozen=True)
class PagedAttention:
    """`query` [T, H, D], each token a row: D is combined, and so is every dimension of the keys and values, whose rows the
    other arguments assign to the tokens; the results begin with [T, H]."""

    query: str


@dataclasses.dataclass(frozen=True)
class PerToken:
    """The first dimension of the tensors `own` is the tokens, each by itself: every other dimension of theirs is combined, and so
    is every dimension of the other tensors; the results begin with the tokens."""

    own: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Combines:
    """`x` [M, H], of whose rows each of `weights` [N, k] has one: k is combined; the result is [N, H]."""

    x: str
    weights: str


@dataclasses.dataclass(frozen=True)
class Experts:
    """Each row of `x` [N, H] by its experts, which `per_token` [N, k] name and weigh: the dimensions of all tensors but their first
    are combined; the result is [N, H]."""

    x: str
    per_token: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Normalises:
    """Statistics over the first tensor's dimensions from `start` (negative: from the end) on, which are combined."""

    start: int


@dataclasses.dataclass(frozen=True)
class Resizes:
    """The first tensor's dimensions in their order, some of another size; nothing is combined."""


@dataclasses.dataclass(frozen=True)
class BySize:
    """A dimension of any of the tensors stays where the result has its size; nothing is combined."""


Batch = (
    Pointwise
    | Reduces
    | Along
    | Product
    | TransposedProduct
    | GroupedProduct
    | Attention
    | PagedAttention
    | PerToken
    | Combines
    | Experts
    | Normalises
    | Resizes
    | BySize
)
