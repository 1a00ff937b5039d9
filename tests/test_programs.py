"""Programs drawn at random (helpers/programs.py): a row is the same alone and among others, or the program is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program, outcome


@pytest.mark.parametrize("seed", range(1000, 1003))
def test_with_default_settings(seed: int) -> None:
    program = Program(seed)
    assert outcome(program, "bi_ascend") != "differs", program.text


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_operator_by_operator(seed: int) -> None:
    """The same with torch.compile's capture alone, which is quick: what is rewritten, broken and left uncompiled."""
    program = Program(seed)
    assert outcome(program, "bi_ascend", {"inner": "eager"}) != "differs", program.text


def test_a_program_that_varies_is_told() -> None:
    """What the tests above rest on."""
    program = Program(0)
    w = torch.randn(600, 40)
    program.width, program.dtype, program.batch, program.steps = (
        600,
        torch.float32,
        33,
        [lambda x: (x @ w).sum(-1, keepdim=True)],
    )
    assert outcome(program, "aot_eager") == "differs"
