"""How the tests of the eager fallback tell whether it is in place."""

from __future__ import annotations

from support import rand, rows_equal
from torch import Tensor

NATIVE = rand(17, 600)
OTHER = rand(600, 40, seed=1)


def native() -> list[Tensor]:
    """Bits of PyTorch's own kernels, which differ from the fallback's."""
    return [NATIVE @ OTHER, NATIVE.sum(), NATIVE.sum(1), NATIVE.softmax(-1)]


def replaced() -> bool:
    """Whether the fallback is in place: a product of one row has then the bits that it has among 17."""
    return rows_equal(lambda x: x @ OTHER, NATIVE, (17,))
