"""Verifying: each kind of variation is found by a batch of its kind, a right function passes, and a mismatch runs again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, python, rand, same_bits
from torch import Tensor
from typer.testing import CliRunner

import bi_compile
from bi_compile.cli import app
from bi_compile.errors import MeasureError
from bi_compile.measure import verify as measured
from bi_compile.measure.bits import difference
from bi_compile.measure.plan import FILLS, LAYOUTS, Batch, batch_from, build, make_plan
from bi_compile.measure.row_function import Case

WEIGHT = rand(1000, 64, seed=1)
PARENT = os.environ.setdefault("BI_COMPILE_TEST_PARENT", str(os.getpid()))


def inputs() -> tuple[Tensor]:
    return (rand(33, 1000),)


def product(x: Tensor) -> Tensor:
    return x @ WEIGHT


def invariant_product(x: Tensor) -> Tensor:
    with bi_compile.invariant():
        return x @ WEIGHT


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_one_bit_is_one_element(dtype: torch.dtype, data: st.DataObject) -> None:
    """Equal bits are no difference, and one bit that is flipped is one element, NaN or not."""
    size = torch.finfo(dtype).bits
    integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
    limits = torch.iinfo(integers)
    words = data.draw(st.lists(st.integers(limits.min, limits.max), min_size=1, max_size=8))
    x = torch.tensor(words, dtype=integers)
    assert difference(x.view(dtype), x.clone().view(dtype)) is None
    at, bit = data.draw(st.integers(0, len(words) - 1)), data.draw(st.integers(0, size - 2))
    y = x.clone()
    y[at] ^= 1 << bit
    found = difference(x.view(dtype), y.view(dtype))
    assert found is not None and (found.elements, found.of, found.index) == (1, len(words), (at,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=50, deadline=None)
@given(x=st.floats(-(2.0**120), 2.0**120, width=32), steps=st.integers(1, 5))
def test_units_of_the_last_place(dtype: torch.dtype, x: float, steps: int) -> None:
    start = torch.tensor([x], dtype=dtype)
    end = start
    for _ in range(steps):
        end = torch.nextafter(end, torch.tensor([math.inf], dtype=dtype))
    found = difference(start, end)
    assert found is not None and found.ulps == steps


def test_what_equality_of_numbers_hides() -> None:
    zero = difference(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert zero is not None and zero.ulps == 0 and zero.elements == 1
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    nan = difference(payload, torch.tensor([math.nan]))
    assert nan is not None and nan.ulps is None and "0x7fc00001" in str(nan)
    assert difference(payload, payload.clone()) is None
    with pytest.raises(ValueError, match="float64"):
        difference(zero := torch.tensor([0.0]), zero.double())


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 6), min_size=1, max_size=9), dim=st.integers(0, 2))
def test_a_batch_holds_its_rows_however_it_lies(layout: str, rows: list[int], dim: int) -> None:
    shape = [4, 5, 3]
    shape[dim] = 7
    x = rand(*shape)
    (built,) = build([x], [dim], Batch(tuple(rows), layout=layout))
    assert same_bits(built, x.index_select(dim, torch.tensor(rows)))
    assert built.data_ptr() != x.data_ptr()
    strides = {"contiguous": built.is_contiguous(), "offset": built.storage_offset() == 1}
    assert strides.get(layout, len(rows) == 1 or not built.is_contiguous())


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 70), seed=st.integers(0, 9))
def test_plans_are_data_and_follow_the_seed(rows: int, seed: int) -> None:
    plan = make_plan(rows, seed, threads=(1, 2), process=True, graphs=True)
    assert plan == make_plan(rows, seed, threads=(1, 2), process=True, graphs=True)
    assert {b.kind for b in plan.batches} == {
        "size", "position", "order", "neighbours", "padding", "memory", "threads", "process", "graph",
    }  # fmt: skip
    for batch in plan.batches:
        assert any(True for _ in batch.compared()) and set(batch.rows) <= set(range(rows))
        assert batch_from(json.loads(json.dumps(dataclasses.asdict(batch)))) == batch


def test_neighbours_are_what_they_are_called() -> None:
    x = rand(3, 4)
    for name in FILLS:
        (built,) = build([x], [0], Batch((0, 1, 2), fills=((1, name),)))
        assert same_bits(built[::2], x[::2])
        assert not same_bits(built[1], x[1]) and len(set(map(str, built[1].tolist()))) == 1


# -- what is found ----------------------------------------------------------------------------------------------------


def by_size(x: Tensor) -> Tensor:
    return x * (1 if x.shape[0] == 1 else 1.5)


def by_position(x: Tensor) -> Tensor:
    return x * (1.5 if x[0, 0] > x[-1, 0] else 1)


def by_neighbours(x: Tensor) -> Tensor:
    return x + 0 * x.amax(0, keepdim=True)


def by_padding(x: Tensor) -> Tensor:
    return x * (1.5 if (x == 0).all(-1).any() else 1)


def by_alignment(x: Tensor) -> Tensor:
    return x * (1.5 if x.storage_offset() else 1)


def by_stride(x: Tensor) -> Tensor:
    return x * (1 if x.stride(-1) == 1 else 1.5)


def by_threads(x: Tensor) -> Tensor:
    return x * torch.get_num_threads()


def by_process(x: Tensor) -> Tensor:
    return x * (1 if str(os.getpid()) == PARENT else 1.5)


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (by_size, "size"),
        (by_position, "position"),
        (by_neighbours, "neighbours"),
        (by_padding, "padding"),
        (by_alignment, "memory"),
        (by_stride, "memory"),
        (by_threads, "threads"),
        (by_process, "process"),
    ],
)
def test_each_kind_is_found_by_its_kind(fn: Callable[[Tensor], Tensor], kind: str) -> None:
    """A function that varies with one thing only is caught by the batch that varies it, and its counterexample is small."""
    x = torch.arange(1.0, 65.0).unsqueeze(1) + torch.arange(3.0)
    evidence = bi_compile.verify(fn, (x,), sizes=(1, 2, 3, 17))
    assert evidence.mismatch is not None and evidence.mismatch.batch.kind == kind, evidence.line()
    assert (len(evidence.mismatch.batch.rows) <= 2 and evidence.left > 0) or kind == "process"


def test_a_product_varies_and_ours_does_not() -> None:
    varies = bi_compile.verify(product, inputs())
    assert varies.mismatch is not None, "this machine's product no longer varies with the batch"
    assert "ULP" in varies.line() and 1 < len(varies.mismatch.batch.rows) <= 33
    ours = bi_compile.verify(invariant_product, inputs())
    assert ours.equal and ours.left == 0, ours.line()
    assert set(ours.batches) == {"size", "position", "order", "neighbours", "padding", "memory", "threads", "process"}
    assert ours.rows["size"] == sum(n for n in measured.SIZES) and "graph" in ours.not_run


def test_compiled_functions() -> None:
    """In static and in dynamic graphs."""

    def block(x: Tensor, weight: Tensor) -> Tensor:
        return torch.softmax(torch.nn.functional.silu(x @ weight) @ weight.t(), -1)

    given = (rand(33, 64), rand(64, 500, seed=1))
    ours = bi_compile.verify(block, given, (0, None), backend="bi_ascend", sizes=(1, 3))
    assert ours.equal and ours.left == 0 and ours.batches["graph"] == 4, ours.line()
    assert "import path" in ours.not_run["process"]


@pytest.mark.parametrize(("dim", "shape"), [(1, (3, 9, 4)), (0, (9, 3, 4)), (-1, (3, 4, 9))])
def test_rows_are_found_along_any_dimension(dim: int, shape: Sequence[int]) -> None:
    """Also where a row's part of the output is several elements long: the batch dimension is merged with another."""

    def merged(x: Tensor) -> tuple[Tensor, Tensor]:
        moved = x.movedim(dim, 0)
        return moved.flatten(0, 1), moved.transpose(0, 2) * 2

    assert bi_compile.verify(merged, (rand(*shape),), dim, sizes=(1, 2, 5)).equal
    wrong = bi_compile.verify(lambda x: merged(x.cumsum(dim)), (rand(*shape),), dim, sizes=(1, 2, 5))
    assert wrong.mismatch is not None and wrong.mismatch.row > 0


def test_the_time_limit_is_said() -> None:
    evidence = bi_compile.verify(by_threads, (rand(4, 4),), time_limit=0)
    assert evidence.left > 0 and not evidence.batches and "did not run" in evidence.line()


# -- what is refused --------------------------------------------------------------------------------------------------

X = rand(6, 4)


@pytest.mark.parametrize(
    ("fn", "given", "dims", "words"),
    [
        (torch.sum, (X,), 0, ("output 0", "no batch dimension", "return an output")),
        (torch.relu, (X,), 2, ("input 0", "no dimension 2")),
        (torch.relu, (X,), (0, 0), ("2 entries for 1 inputs",)),
        (torch.relu, (X,), (None,), ("no input has a batch dimension",)),
        (torch.add, (X, 1), (0, 0), ("input 1 is int", "None")),
        (torch.add, (X, X[:1]), 0, ("input 0 has 6, input 1 has 1",)),
        (torch.add, (X, X), 0, ("inputs 0 and 1 share memory", "clone")),
        (torch.matmul, (X, X.t()), (0, None), ("inputs 0 and 1 share memory",)),
        (torch.rand_like, (X,), 0, ("not deterministic", "random")),
        ("torch:no_such_function", (X,), 0, ("cannot be imported", "package.module:name")),
        ("no_such_module:f", (X,), 0, ("cannot be imported",)),
    ],
)
def test_bad_input_is_one_sentence(fn: Any, given: tuple[Any, ...], dims: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(MeasureError) as error:
        bi_compile.verify(fn, given, dims)
    assert all(w in str(error.value) for w in words), error.value
    assert "\n" not in str(error.value)


def test_a_builtin_whose_inputs_have_no_names() -> None:
    with pytest.raises(MeasureError, match=r"the inputs of .*matmul.* have no names"):
        bi_compile.verify(torch.matmul, (X, rand(4, 4)), (0, None), backend="bi_ascend")


# -- the counterexample, the command ----------------------------------------------------------------------------------


def test_a_counterexample_is_a_program(tmp_path: Path) -> None:
    case = Case(product, inputs())
    mismatch = bi_compile.verify(product, inputs()).mismatch
    assert mismatch is not None
    measured.write(case, mismatch, tmp_path / "again.py")
    done = subprocess.run([sys.executable, "again.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    # the same row differs; by how much may depend on where the memory of a process lies
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.partition(" differs ")[0] == str(mismatch).partition(" differs ")[0]
    (tmp_path / "again.pt").unlink()
    done = subprocess.run([sys.executable, "again.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "FileNotFoundError" in done.stderr, done.stdout + done.stderr
    with pytest.raises(MeasureError, match="no import path"):
        measured.write(Case(lambda x: x, inputs()), mismatch, tmp_path / "other.py")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--inputs", "tests.measure.test_verify:inputs"]
    result = CliRunner().invoke(app, ["verify", "function", "tests.measure.test_verify:product", *common])
    assert result.exit_code == 1 and "is not batch-invariant" in result.output, result.output
    assert (tmp_path / "counterexample.py").exists() and "python counterexample.py" in result.output
    result = CliRunner().invoke(app, ["verify", "function", "torch:relu", *common, "--batch-dims", "one"])
    assert result.exit_code == 2 and "--batch-dims one" in result.output
    result = CliRunner().invoke(app, ["verify", "function", "torch:relu", *common])
    assert result.exit_code == 0 and "no mismatch" in result.output, result.output


def test_importing_the_package_does_not_import_it() -> None:
    said = python(
        "import sys, bi_compile; print('rich.progress' in sys.modules, any(m.startswith('bi_compile.measure') for m in sys.modules))"
    )
    assert said.split() == ["False", "False"]
