"""The rules are about operators that exist, each under one verdict."""

import pytest
import torch
import torch._inductor.inductor_prims  # registers Inductor's primitives
from packaging.version import Version

from bi_compile.audit.pointwise import POINTWISE, SINCE, aten, default
from bi_compile.audit.spec import DATA_DEPENDENT, MOVES, ORDER_FREE, RANDOM
from bi_compile.table import find_operator

ROWS = {
    "random": RANDOM.operators,
    "data-dependent": DATA_DEPENDENT.operators,
    "moves": MOVES.operators,
    "pointwise": POINTWISE,
    "order-free": ORDER_FREE.operators,
}
HERE = Version(torch.__version__).release


@pytest.mark.parametrize("row", ROWS)
def test_every_operator_exists_in_this_torch(row: str) -> None:
    wanted = [name for name in ROWS[row] if Version(SINCE.get(name, "0")).release <= HERE]
    assert [name for name in wanted if find_operator(name) is None] == []


def test_an_operator_stands_in_one_row() -> None:
    names = [name for row in ROWS.values() for name in row]
    assert sorted(names) == sorted(set(names))


def test_what_only_newer_releases_have_stands_in_a_row() -> None:
    assert set().union(*ROWS.values()) >= SINCE.keys()


def test_a_misspelt_operator_is_an_error() -> None:
    with pytest.raises(AttributeError, match="emty_like"):
        aten("clone emty_like")
    with pytest.raises(AttributeError, match="iotta"):
        default("prims", "iota iotta")
