"""Options: malformed ones are refused in a sentence, and a digest of them keys the caches."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import graph_of, python, rand, targets

import bi_compile
from bi_compile import OptionError, Options, Pass, Pipeline
from bi_compile import resolve as resolve_module
from bi_compile.options import read_options
from bi_compile.passes import PASSES, Softmax
from bi_compile.resolve import pass_names, resolve, resolve_passes
from bi_compile.table import Table

NAMES = [p.name for p in PASSES]
MINE = """
import torch
from bi_compile import Pass, replaces

class Mine(Pass):
    name = "mine"

    @replaces(torch.ops.aten.cumprod.default, why="a test", source="a test")
    def cumprod(self, dim, *, dtype=None):
        return torch.exp(torch.log(self) {more})

OTHER = 3
"""

BAD: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], r"the options of bi_compile must be a mapping, got \[1\]"),
    "unknown key": (
        {"pases": ["softmax"]},
        r"unknown option 'pases' \(did you mean 'passes'\?\): bi_compile knows passes, on_unproven, dump_dir, target, inner, trust, batch",
    ),
    "two unknown keys": ({"a": 1, "b": 2}, r"unknown option 'a', 'b'"),
    "passes a string": (
        {"passes": "softmax"},
        r'passes=\'softmax\': it must be a list of names, as in \["bi_ascend"\]',
    ),
    "passes a number": ({"passes": 3}, r"passes=3: it must be a list of names"),
    "passes of numbers": ({"passes": [3]}, r"passes=\[3\]: it must be a list of names"),
    "unknown pass": (
        {"passes": ["softmaxx"]},
        r"unknown pass 'softmaxx' \(did you mean 'softmax'\?\): known are bi_ascend, " + ", ".join(NAMES),
    ),
    "on_unproven": ({"on_unproven": "ignore"}, r"on_unproven='ignore': it must be 'error' or 'warn'"),
    "on_unproven a number": ({"on_unproven": 1}, r"on_unproven=1: it must be a str"),
    "target": ({"target": "tpu"}, r"unknown target 'tpu' \(did you mean 'cpu'\?\): known are ascend-950.*cpu.*cuda"),
    "target a number": ({"target": 1}, r"(unknown target 1|target=1: it must be)"),
    "target a list": ({"target": ["cpu"]}, r"target=\['cpu'\]: it must be the name of a target"),
    "dump_dir of a NUL": ({"dump_dir": "a\0b"}, r"dump_dir='a\\x00b': it must be the name of a folder"),
    "dump_dir empty": ({"dump_dir": ""}, r"dump_dir='': it must be the name of a folder"),
    "probe empty": ({"probe": ""}, r"probe='': it must be the name of a file"),
    "inner a number": ({"inner": 1}, r"inner=1: it must be a str"),
    "inner unknown": ({"inner": "inductr"}, r"inner='inductr' \(did you mean 'inductor'\?\): known are inductor"),
    "inner itself": ({"inner": "bi_ascend"}, r"inner='bi_ascend' would compile each graph twice"),
    "trust a list": (
        {"trust": ["ns::op"]},
        r"trust=\['ns::op'\]: it must map an operator to the reason why it is invariant",
    ),
    "trust without a reason": ({"trust": {"ns::op": " "}}, r"trust=.*it must map an operator to the reason"),
    "trust with a flag": ({"trust": {"ns::op": True}}, r"trust=.*it must map an operator to the reason"),
    "trust of no operator": ({"trust": {3: "why"}}, r"trust=.*it must map an operator to the reason"),
    "tp_invariant of three": (
        {"tp_invariant": 3},
        r"tp_invariant=3: it must be the largest number of ranks, a power of two",
    ),
    "tp_invariant of one": ({"tp_invariant": 1}, r"tp_invariant=1: it must be the largest number of ranks"),
    "tp_invariant a flag": ({"tp_invariant": True}, r"tp_invariant=True: it must be the largest number of ranks"),
    "tp_invariant a name": ({"tp_invariant": "4"}, r"tp_invariant='4': it must be the largest number of ranks"),
    "batch a number": ({"batch": 0}, r"batch=0: it must map an input of the graph to its batch dimension"),
    "batch by name": ({"batch": {"x": "rows"}}, r"batch=.*it must map an input"),
    "batch a flag": ({"batch": {"x": True}}, r"batch=.*it must map an input"),
    "dump_dir a number": ({"dump_dir": 3}, r"dump_dir=3"),
    "pass of no module": (
        {"passes": ["no_such_module:Mine"]},
        r"the pass 'no_such_module:Mine' cannot be imported \(No module named 'no_such_module'\): known are bi_ascend",
    ),
    "pass of no attribute": (
        {"passes": ["bi_compile:Mine"]},
        r"the pass 'bi_compile:Mine' cannot be imported .*known are",
    ),
    "pass that is none": (
        {"passes": ["bi_compile.passes:PASSES"]},
        r"'bi_compile.passes:PASSES' is .* which is not a subclass of bi_compile.Pass",
    ),
    "pass without an attribute": ({"passes": ["bi_compile:"]}, r"'bi_compile:'"),
    "pass without a module": ({"passes": [":Mine"]}, r"the pass ':Mine' cannot be imported"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_option_is_refused_in_a_sentence(name: str) -> None:
    """That names it and what is known."""
    given, message = BAD[name]
    with pytest.raises(OptionError, match=message):
        resolve(read_options(given))


def test_an_option_error_is_a_value_error() -> None:
    assert issubclass(OptionError, ValueError)


def test_options_that_are_set_elsewhere_are_unknown() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'passes': bi_compile knows on_unproven"):
        read_options({"passes": ["softmax"]}, passes=["matmul"])


@pytest.mark.parametrize("given", [None, {}])
def test_without_options_every_pass_runs_and_nothing_is_let_through(given: Any) -> None:
    options = read_options(given)
    assert (
        resolve_passes(options.passes) == list(PASSES)
        and options.on_unproven == "error"
        and options.inner == "inductor"
    )


def test_well_formed_options_are_read(tmp_path: Path) -> None:
    options = read_options(
        {
            "passes": ["softmax"],
            "on_unproven": "warn",
            "dump_dir": tmp_path,
            "target": "cpu",
            "inner": "eager",
            "trust": {"a::b": "c"},
            "batch": {"x": 0},
        }
    )
    assert options == Options(("softmax",), "warn", str(tmp_path), "cpu", "eager", {"a::b": "c"}, {"x": 0})


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["bi_ascend"], NAMES),
        (["softmax"], ["softmax"]),
        (["matmul", "softmax"], ["matmul", "softmax"]),
        (["softmax", "softmax"], ["softmax"]),
        ([], []),
    ],
)
def test_passes_come_in_the_order_given_each_once(names: list[str], want: list[str]) -> None:
    assert [p.name for p in resolve_passes(names)] == want


def test_every_name_is_known() -> None:
    assert pass_names() == ["bi_ascend", *NAMES]
    assert resolve_passes(["softmax", "bi_ascend"])[0] is Softmax and len(
        resolve_passes(["softmax", "bi_ascend"])
    ) == len(PASSES)


def test_a_program_has_no_tp_invariant() -> None:
    """Torch.compile and eager code do not know what is divided over ranks."""
    options = {"tp_invariant": 4}
    with pytest.raises(OptionError, match=r"tp_invariant=4: a program does not say .* an option of vLLM's engines"):
        bi_compile.invariant(Options(**options)).__enter__()
    with pytest.raises(Exception, match=r"tp_invariant=4: a program does not say"):
        torch.compile(lambda x: x + 1, backend="bi_ascend", options=options)(torch.ones(2))


def test_with_tp_invariant_no_other_sum_over_ranks_is_let_through() -> None:
    found = Table(resolve(Options(tp_invariant=4)).passes, "cpu").by_overload
    without = Table(resolve(Options()).passes, "cpu").by_overload
    assert found.keys() == without.keys()
    entry, replacement = found[torch.ops._c10d_functional.all_reduce.default]
    assert entry.stays(torch.ones(2), "max", "group")
    with pytest.raises(NotImplementedError, match="a sum over ranks with tp_invariant has no invariant form"):
        replacement(torch.ones(2), "sum", "group")


# -- a pass of the user's ---------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a pass in a module of the user's."""
    (tmp_path / "users_module_of_options.py").write_text(MINE.format(more=".cumsum(dim)"))
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_module_of_options:Mine"
    sys.modules.pop("users_module_of_options", None)


def test_a_users_pass_is_used(mine: str) -> None:
    pipeline = Pipeline(Options(passes=("bi_ascend", mine)))
    gm, (x,), _ = graph_of((torch.ops.aten.cumprod.default, (rand(3, 4).abs(), 1), {}))
    pipeline.rewrite(gm.graph, "captured")
    assert "aten.cumprod.default" not in targets(gm.graph)
    pipeline.rewrite(gm.graph, "captured")  # what a later pass leaves an earlier one takes the next time
    gm.recompile()
    torch.testing.assert_close(gm(x)[0], x.cumprod(1))


def test_a_users_module_without_that_pass_is_refused(mine: str) -> None:
    module = mine.split(":")[0]
    with pytest.raises(OptionError, match=rf"the pass '{module}:Nothing' cannot be imported"):
        resolve(Options(passes=(f"{module}:Nothing",)))
    with pytest.raises(OptionError, match=rf"'{module}:OTHER' is 3, which is not a subclass of bi_compile.Pass"):
        resolve(Options(passes=(f"{module}:OTHER",)))


def test_a_users_module_that_fails_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_module_that_fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        OptionError, match=r"the pass 'users_module_that_fails:Mine' cannot be imported \(division by zero\)"
    ):
        resolve(Options(passes=("users_module_that_fails:Mine",)))


# -- the dump's folder ------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OptionError, match=r"dump_dir='.*file/dumps' cannot be written \(.*\): name a folder that can"):
        resolve(Options(dump_dir=str(file / "dumps")))
    with pytest.raises(OptionError, match=r"dump_dir='.*file' cannot be written"):
        resolve(Options(dump_dir=str(file)))


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    resolve(Options(dump_dir=str(tmp_path / "new" / "folder")))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_may_be_looked_at_by_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: resolve(Options(dump_dir=str(tmp_path))).options.dump_dir, range(400)))) == 1
    assert list(tmp_path.iterdir()) == []


# -- the digest -------------------------------------------------------------------------------------------------------


def uuid(**options: Any) -> str:
    return Pipeline(Options(**options)).uuid()


def test_the_digest_tells_options_apart(tmp_path: Path) -> None:
    sets: list[dict[str, Any]] = [
        {}, {"passes": ("softmax",)}, {"passes": ("softmax", "matmul")}, {"passes": ("matmul", "softmax")},
        {"on_unproven": "warn"}, {"target": "cpu"},
        {"inner": "eager"}, {"trust": {"a::b": "c"}}, {"trust": {"a::b": "d"}},
        {"batch": {"x": 0}}, {"batch": {"x": 1}},
    ]  # fmt: skip
    assert len({uuid(**s) for s in sets}) == len(sets)
    assert all(uuid(**s) == uuid(**s) for s in sets)


def test_the_digest_follows_where_dumps_go_and_not_the_order_of_keys(tmp_path: Path) -> None:
    """What comes from a cache is not dumped."""
    assert uuid(dump_dir=str(tmp_path)) != uuid()
    assert uuid(trust={"a::b": "c", "d::e": "f"}) == uuid(trust={"d::e": "f", "a::b": "c"})


def test_the_digest_follows_a_users_pass(mine: str, tmp_path: Path) -> None:
    before = uuid(passes=(mine,))
    sys.modules.pop("users_module_of_options")
    (tmp_path / "users_module_of_options.py").write_text(MINE.format(more=".cumsum(dim) * 1"))
    assert uuid(passes=(mine,)) != before


def test_the_digest_is_the_same_in_another_process() -> None:
    program = """
from bi_compile import Options, Pipeline
print(Pipeline(Options(passes=("softmax",), trust={"a::b": "c", "d::e": "f"})).uuid())
"""
    for seed in ("1", "2"):
        assert python(program, PYTHONHASHSEED=seed).strip() == uuid(
            passes=("softmax",), trust={"a::b": "c", "d::e": "f"}
        )


def test_a_pass_of_an_installed_package_goes_by_its_short_name(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry point of the group bi_compile.passes; two packages that disagree about a name are refused."""
    for package, value in (("one", mine), ("two", mine)):
        (tmp_path / f"{package}-1.dist-info").mkdir()
        (tmp_path / f"{package}-1.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: 1\n")
        (tmp_path / f"{package}-1.dist-info" / "entry_points.txt").write_text(
            f"[bi_compile.passes]\nshared = {value}\n{package} = {value if package == 'one' else 'elsewhere:Mine'}\n"
        )
    assert resolve_passes(["one"]) == resolve_passes(["shared"]) == resolve_passes([mine])
    assert pass_names()[-3:] == ["one", "shared", "two"]
    with pytest.raises(OptionError, match="the pass 'two' cannot be imported"):
        resolve_passes(["two"])
    (tmp_path / "two-1.dist-info" / "entry_points.txt").write_text("[bi_compile.passes]\nshared = elsewhere:Mine\n")
    with pytest.raises(OptionError, match=f"'shared' is in several installed packages \\(elsewhere:Mine, {mine}\\)"):
        resolve_passes(["shared"])


def test_an_operator_that_is_registered_after_the_options_were_read() -> None:
    """An engine's pass is made before vLLM's operators are there."""

    class Late(Pass):
        name = "late"

    @Late.replaces("testlate.twice.default", why="a test", source="a test")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve_module, "PASSES", (*PASSES, Late))
        pipeline = Pipeline(Options(passes=("late",), target="cpu"))
    with torch.library._scoped_library("testlate", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        assert pipeline.knowledge("cpu").table.get(torch.ops.testlate.twice.default) is not None
