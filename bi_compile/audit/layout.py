"""The layout of a tensor: for each dimension the factors that it is made of, and which of them count rows.

From the slowest factor to the fastest, each with its size. A view that merges the batch with other dimensions makes one
dimension of several factors; a view that splits it again finds them. Factors are told apart by the sizes that the compiler
saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import SymInt, Tensor


@dataclasses.dataclass(frozen=True)
class Factor:
    """A part of a dimension."""

    size: int
    rows: bool


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def carries(dim: Dim) -> bool:
    return any(f.rows for f in dim)


def size_of(n: Any) -> int:
    """A size as the compiler saw it; 0 where it follows the data and nobody has seen it."""
    if isinstance(n, int):
        return n
    return int(n.node.hint) if isinstance(n, SymInt) and n.node.has_hint() else 0


def plain(value: Tensor, dims: Iterable[int] = ()) -> Layout:
    """One factor for each dimension; those in `dims` carry rows."""
    return tuple((Factor(size_of(n), i in dims),) for i, n in enumerate(value.shape))


def as_one(dim: Dim, size: int) -> Dim:
    """The dimension as one factor of another size."""
    return (Factor(size, carries(dim)),)


def union(a: Dim, b: Dim) -> Dim:
    """A dimension in which the two meet element by element."""
    if carries(a) and carries(b) and a != b and len(a) == len(b):
        return tuple(Factor(x.size, x.rows or y.rows) for x, y in zip(a, b, strict=True))
    return a if carries(a) else b


def split(layout: Layout, shape: Sequence[int]) -> Layout:
    """The layout after a reshape to `shape`: the factors in order, dealt out to the new dimensions, cut where one ends."""
    factors = [f for dim in layout for f in dim if f.size != 1]
    found: list[Dim] = []
    for n in shape:
        dim: list[Factor] = []
        need = n
        while need != 1 and factors:
            f = factors.pop(0)
            if f.size and need % f.size == 0:
                dim.append(f)
                need //= f.size
            elif need and f.size % need == 0:
                dim.append(Factor(need, f.rows))
                factors.insert(0, Factor(f.size // need, f.rows))
                need = 1
            else:  # sizes without a common factor, or a size that nobody has seen: rows may be in all that is left
                rows = f.rows or any(g.rows for g in (*dim, *factors))
                return (*found, *((Factor(m, rows),) for m in shape[len(found) :]))
        found.append(tuple(dim) or (Factor(n, False),))
    return tuple(found)
