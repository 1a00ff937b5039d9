"""The table: entries that fit their operators, one replacement for each, and the overloads that follow from it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  defines an operator that the tables name
from support import close, graph_of, rand, same_bits, table
from torch import Tensor

from bi_compile import Pass, RewriteError, TableError, invariant, refuse, replaces
from bi_compile.cache_key import pass_digest
from bi_compile.passes import PASSES
from bi_compile.rewrite.splice import rewrite
from bi_compile.table import Entry, Table, find_operator, given

aten = torch.ops.aten
#: libraries that need not be installed
FOREIGN = ("npu", "vllm", "vllm_ir", "symm_mem", "_C", "_C_ascend")
ENTRIES = [entry for p in PASSES for entry in p.entries]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.operator)


def a_pass(name: str, operator: Any, fn: Callable[..., Any]) -> type[Pass]:
    return type(name.title(), (Pass,), {"name": name, "fn": replaces(operator, why="a test", source="a test")(fn)})


# -- the tables of this package ---------------------------------------------------------------------------------------


@each_entry
def test_an_entry_names_an_operator_that_exists_or_one_of_another_library(entry: Entry) -> None:
    assert len(entry.operator.split(".")) == 3
    assert entry.op is not None or entry.operator.split(".")[0] in FOREIGN


@each_entry
def test_an_entry_says_why_and_from_where(entry: Entry) -> None:
    assert entry.why.strip() and entry.source.strip() and entry.pass_name in [p.name for p in PASSES]


@each_entry
def test_a_replacement_takes_its_operators_arguments(entry: Entry) -> None:
    """`overloads` raises TableError where it does not."""
    overloads = list(entry.overloads())
    assert [op for op, _ in overloads][:1] == ([entry.op] if entry.op is not None else [])
    assert all(op._schema.is_mutable for op, _ in overloads[1:])


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_all_passes_go_together(target: str) -> None:
    by_overload = Table(PASSES, target).by_overload
    assert {"aten.mm.default", "aten.mm.out", "aten.sum.IntList_out", "aten._softmax.default"} <= {
        str(op) for op in by_overload
    }


def test_passes_have_names_of_their_own_and_documentation() -> None:
    names = [p.name for p in PASSES]
    assert len(set(names)) == len(names) and all(p.__doc__ for p in PASSES)


def test_what_a_pattern_is_called_is_found_in_one_pass_alone() -> None:
    names = [name for p in PASSES for name in {pattern.name for pattern in p.patterns}]
    assert len(set(names)) == len(names) and {"rms_norm", "layer_norm", "softmax", "log_softmax"} <= set(names)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "fn"),
    [
        (aten.mm.default, lambda self: self),
        (aten.mm.default, lambda self, mat2, more: self),
        (aten.sum.default, lambda self: self),
        (aten.sum.dim_IntList, lambda self, dim, keepdim=False: self),
        (aten.sum.dim_IntList, lambda self, dim, *, dtype=None: self),
        (aten.addmm.default, lambda self, mat1, mat2, *, beta=1: self),
        (aten.addmm.default, lambda self, mat1, mat2, beta=1, alpha=1: self),
    ],
    ids=["too few", "too many", "no dtype", "no dtype beside keepdim", "no keepdim", "no alpha", "keywords by place"],
)
def test_a_replacement_with_other_arguments_is_refused(operator: Any, fn: Callable[..., Any]) -> None:
    with pytest.raises(
        TableError,
        match=rf"of {operator} in the pass 'mine' has the signature .*does not fit aten::.*give it the",
    ):
        Table([a_pass("mine", operator, fn)], "cpu")


@pytest.mark.parametrize(
    "fn",
    [
        lambda self, dim, keepdim=False, *, dtype=None: self,
        lambda a, b, c=False, *, dtype=None: a,
        lambda *args, **kwargs: args[0],
        lambda self, dim, keepdim=False, **kwargs: self,
    ],
    ids=["named", "other names", "anything", "any keyword"],
)
def test_a_replacement_that_takes_the_operators_arguments_fits(fn: Callable[..., Any]) -> None:
    (op, (_, replacement)), *_ = Table([a_pass("mine", aten.sum.dim_IntList, fn)], "cpu").by_overload.items()
    assert op is aten.sum.dim_IntList and replacement is fn


def test_a_wrong_number_of_outputs_is_found_at_rewriting() -> None:
    gm, _, _ = graph_of((aten.var_mean.correction, (rand(3, 4), [1]), {}))
    mine = a_pass(
        "mine", aten.var_mean.correction, lambda self, dim=None, *, correction=None, keepdim=False: self.var(dim)
    )
    with pytest.raises(
        RewriteError, match=r"pass 'mine', node var_mean_correction .*the operator has 2 outputs, its replacement 1"
    ):
        rewrite(gm.graph, Table([mine], "cpu"), "mine")


def test_two_passes_with_one_operator_are_refused_by_name() -> None:
    first, second = (a_pass(name, aten.mm.default, lambda self, mat2: self) for name in ("first", "second"))
    with pytest.raises(
        TableError, match=r"the passes 'first' and 'second' both replace aten.mm.default: leave one of them out"
    ):
        Table([first, second], "cpu")


def test_an_entry_for_a_derived_overload_meets_the_derived_one() -> None:
    first = a_pass("first", aten.mm.default, lambda self, mat2: self)
    second = a_pass("second", aten.mm.out, lambda self, mat2, *, out: out)
    with pytest.raises(TableError, match=r"'first' and 'second' both replace aten.mm.out"):
        Table([first, second], "cpu")


def test_a_pass_without_a_name_is_refused() -> None:
    with pytest.raises(TableError, match=r"the pass .*Nameless has no name: give it `name ="):

        class Nameless(Pass):
            pass


def test_what_a_pass_says_holds_for_its_entries_and_an_entry_may_say_more() -> None:
    class Mine(Pass):
        name = "mine"
        why = "the pass's reason"
        source = "the pass's source"

    @Mine.replaces(aten.mm.default)
    def mm(self: Tensor, mat2: Tensor) -> Tensor:
        return self

    @Mine.replaces(aten.mv.default, aten.dot.default, why="its own", source="another")
    def mv(self: Tensor, vec: Tensor) -> Tensor:
        return self

    assert [(e.operator, e.why, e.source, e.replacement, e.pass_name) for e in Mine.entries] == [
        ("aten.mm.default", "the pass's reason", "the pass's source", mm, "mine"),
        ("aten.mv.default", "its own", "another", mv, "mine"),
        ("aten.dot.default", "its own", "another", mv, "mine"),
    ]
    assert Pass.entries == () and a_pass("other", aten.mm.default, mm).entries[0].pass_name == "other"


@pytest.mark.parametrize("said", [{}, {"why": "a test"}, {"source": "a test"}, {"why": "", "source": "a test"}])
def test_a_replacement_without_a_reason_or_a_source_is_refused(said: dict[str, str]) -> None:
    missing = "source" if said.get("why") else "why"
    with pytest.raises(TableError, match=rf"the pass 'mine' gives no {missing} for aten.mm.default: set `{missing} = "):
        type("Mine", (Pass,), {"name": "mine", "fn": replaces(aten.mm.default, **said)(lambda self, mat2: self)})


def test_what_groups_are_called_now_is_said() -> None:
    with pytest.raises(ImportError, match=r"bi_compile.Group is called Pattern now"):
        from bi_compile import Group  # type: ignore[attr-defined] # noqa: F401
    with pytest.raises(TableError, match=r"the pass 'mine' lists groups: write `patterns ="):
        type("Mine", (Pass,), {"name": "mine", "groups": ()})


def test_a_refusal_names_the_operator_the_arguments_and_the_remedy() -> None:
    named = given({"a": 1, "b": None, "c": torch.zeros(1), "d": 5, "e": 0, "f": 6}, {"d": 5, "f": 7})
    with pytest.raises(NotImplementedError, match=r"^mylib.op with a, c, f has no invariant form: leave them out$"):
        refuse("mylib.op", named, "leave them out")


def test_a_passs_digest_holds_the_modules_of_its_replacements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacements may stand in other modules than the pass."""
    (tmp_path / "the_pass.py").write_text(
        "from bi_compile import Pass\nclass Mine(Pass): name, why, source = 'mine', 'a test', 'a test'\n"
    )
    (tmp_path / "the_replacement.py").write_text(
        "from the_pass import Mine\n@Mine.replaces('aten.floor.default')\ndef floor(self): return self\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("the_pass").Mine
    before = pass_digest(mine)
    importlib.import_module("the_replacement")
    assert pass_digest(mine) != before


def test_an_operator_that_is_not_installed_is_passed_over() -> None:
    assert find_operator("no_such_library.op.default") is None
    assert Table([a_pass("mine", "no_such_library.op.default", lambda x: x)], "cpu").by_overload == {}


def test_an_entry_for_another_target_is_passed_over() -> None:
    class Elsewhere(Pass):
        name = "elsewhere"

        @replaces(aten.mm.default, why="a test", source="a test", targets=["cuda"])
        def mm(self: Tensor, mat2: Tensor) -> Tensor:
            return self

    assert Table([Elsewhere], "cpu").by_overload == {}
    assert aten.mm.default in Table([Elsewhere], "cuda").by_overload


def test_one_function_may_replace_several_operators() -> None:
    mine = a_pass("mine", "aten.amax.default", lambda self, dim=(), keepdim=False: self)
    twice = replaces("aten.amin.default", why="a test", source="a test")(mine.fn)  # type: ignore[attr-defined]

    class Both(Pass):
        name = "both"
        fn = twice

    assert {e.operator for e in Both.entries} == {"aten.amax.default", "aten.amin.default"}
    assert {e.pass_name for e in Both.entries} == {"both"}


def test_what_is_no_overload_has_no_entry() -> None:
    assert (
        table().get(len) is None and table().get("aten.mm.default") is None and table().get(aten.relu.default) is None
    )


# -- out= and in place ------------------------------------------------------------------------------------------------


def x() -> Tensor:
    return rand(6, 8)


OUT: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "aten.mm.out": ((rand(6, 8), rand(8, 5)), {}),
    "aten.addmm.out": ((rand(5), rand(6, 8), rand(8, 5)), {"beta": 0.5, "alpha": 2}),
    "aten.bmm.out": ((rand(2, 6, 8), rand(2, 8, 5)), {}),
    "aten.baddbmm.out": ((rand(2, 6, 5), rand(2, 6, 8), rand(2, 8, 5)), {"beta": 0.5}),
    "aten.addbmm.out": ((rand(6, 5), rand(2, 6, 8), rand(2, 8, 5)), {"beta": 0.5}),
    "aten.mv.out": ((rand(6, 8), rand(8)), {}),
    "aten.addmv.out": ((rand(6), rand(6, 8), rand(8)), {"alpha": 2}),
    "aten.dot.out": ((rand(8), rand(8, seed=1)), {}),
    "aten.linear.out": ((rand(6, 8), rand(5, 8), rand(5)), {}),
    "aten.matmul.out": ((rand(2, 6, 8), rand(8, 5)), {}),
    "aten.sum.out": ((x(),), {}),
    "aten.sum.IntList_out": ((x(), [1], True), {"dtype": torch.float64}),
    "aten.nansum.out": ((x(), [0]), {}),
    "aten.mean.dtype_out": ((x(),), {}),
    "aten.mean.out": ((x(), [0, 1]), {}),
    "aten.var_mean.correction_out": ((x(), [1]), {"correction": 0}),
    "aten.std_mean.correction_out": ((x(), [1]), {"keepdim": True}),
    "aten.var.correction_out": ((x(), [0]), {}),
    "aten.std.correction_out": ((x(), [0]), {}),
    "aten.linalg_vector_norm.out": ((x(), 3, [1]), {}),
    "aten.norm.out": ((x(), 2, [1], True), {}),
    "aten.norm.dtype_out": ((x(), 2, [1], True), {"dtype": torch.float64}),
    "aten.norm.Scalar_out": ((x(), 2), {}),
    "aten.logsumexp.out": ((x(), [1]), {}),
    "aten.cumsum.out": ((x(), 1), {}),
    "aten._softmax.out": ((x(), 1, False), {}),
    "aten._log_softmax.out": ((x(), 0, False), {}),
    "aten.native_layer_norm.out": ((x(), [8], rand(8), None, 1e-5), {}),
    "aten.native_group_norm.out": ((x(), None, None, 6, 8, 1, 2, 1e-5), {}),
    "aten.sort.values": ((x(), 0), {}),
    "aten.sort.values_stable": ((x(),), {"stable": False, "dim": 1}),
    "aten.argsort.stable_out": ((x(),), {"stable": True, "dim": 0}),
    "aten.topk.values": ((x(), 3), {}),
    "aten.kthvalue.values": ((x(), 2, 1, True), {}),
    "aten.median.dim_values": ((x(), 1), {}),
    "aten.nanmedian.dim_values": ((x(), 0, True), {}),
    "aten.mode.values": ((x(), 1), {}),
    "aten.index_put.out": ((x(), [torch.tensor([1, 0])], rand(2, 8)), {}),
    "aten.put.out": ((x(), torch.tensor([3, 1]), rand(2)), {}),
    "aten.index_copy.out": ((x(), 0, torch.tensor([3, 1]), rand(2, 8)), {}),
    "aten.convolution.out": ((rand(1, 2, 8), rand(3, 2, 3), None, [1], [0], [1], False, [0], 1), {}),
    "aten.avg_pool2d.out": ((rand(1, 2, 6, 8), [2, 2]), {}),
    "aten.avg_pool3d.out": ((rand(1, 2, 4, 6, 8), [2, 2, 2]), {}),
    "aten._adaptive_avg_pool2d.out": ((rand(1, 2, 6, 8), [3, 4]), {}),
    "aten._adaptive_avg_pool3d.out": ((rand(1, 2, 4, 6, 8), [2, 3, 4]), {}),
}
IN_PLACE: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "aten.addmm_.default": ((rand(6, 5), rand(6, 8), rand(8, 5)), {"beta": 0.5, "alpha": 2}),
    "aten.baddbmm_.default": ((rand(2, 6, 5), rand(2, 6, 8), rand(2, 8, 5)), {}),
    "aten.addbmm_.default": ((rand(6, 5), rand(2, 6, 8), rand(2, 8, 5)), {}),
    "aten.addmv_.default": ((rand(6), rand(6, 8), rand(8)), {"beta": 2}),
    "aten.cumsum_.default": ((rand(6, 8), 1), {}),
    "aten.index_put_.default": ((rand(6, 8), [torch.tensor([1, 0])], rand(2, 8)), {}),
    "aten.put_.default": ((rand(6, 8), torch.tensor([3, 1]), rand(2)), {}),
    "aten.index_copy_.default": ((rand(6, 8), 0, torch.tensor([3, 1]), rand(2, 8)), {}),
}
#: those whose arguments no CPU takes, and oneDNN's LSTM, which nobody calls so
NOT_TRIED = {"aten._scaled_mm.out", "_c10d_functional.all_reduce_.default", "aten.mkldnn_rnn_layer.out"}


def derived() -> set[str]:
    return {str(op) for p in PASSES for e in p.entries if e.targets is None for op, _ in list(e.overloads())[1:]}


def test_every_derived_overload_is_tried() -> None:
    assert derived() - NOT_TRIED == {*OUT, *IN_PLACE}


def into(name: str, outs: list[Tensor]) -> dict[str, Tensor]:
    op = find_operator(name)
    assert op is not None
    return dict(zip([a.name for a in op._schema.arguments if a.is_out], outs, strict=True))


@pytest.mark.parametrize("name", OUT)
def test_out_is_written_resized_and_returned(name: str) -> None:
    """Into tensors of the right size, into empty ones, and into ones of other strides; as PyTorch's own."""
    op, (args, kwargs) = find_operator(name), OUT[name]
    assert op is not None
    _, replacement = table().by_overload[op]
    outs = len([a for a in op._schema.arguments if a.is_out])
    empty = [
        torch.empty(
            0, dtype=torch.int64 if a.name == "indices" or "argsort" in name else kwargs.get("dtype", torch.float32)
        )
        for a in op._schema.arguments
        if a.is_out
    ]
    want = [e.clone() for e in empty]
    op(*args, **kwargs, **into(name, want))
    transposed = [torch.empty(w.shape[::-1], dtype=w.dtype).permute(tuple(range(w.dim()))[::-1]) for w in want]
    for mine in ([e.clone() for e in empty], [torch.empty_like(w) for w in want], transposed):
        strides = [m.stride() for m in mine]
        returned = replacement(*args, **kwargs, **into(name, mine))
        assert all(a is b for a, b in zip([returned] if outs == 1 else returned, mine, strict=True))
        close(mine, want)
        assert mine[0].numel() == 0 or mine is not transposed or [m.stride() for m in mine] == strides


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_written_into_the_first_argument(name: str) -> None:
    op, ((self, *rest), kwargs) = find_operator(name), IN_PLACE[name]
    assert op is not None
    _, replacement = table().by_overload[op]
    want, mine = self.clone(), self.clone()
    op(want, *rest, **kwargs)
    assert replacement(mine, *rest, **kwargs) is mine
    close(mine, want)
    transposed = self.clone().mT.contiguous().mT if self.dim() > 1 else self.repeat_interleave(2)[::2]
    replacement(transposed, *rest, **kwargs)
    assert same_bits(transposed, mine)


def test_out_of_another_dtype_is_as_pytorchs() -> None:
    """A safe cast is made, an unsafe one refused."""
    a, b = rand(4, 4), rand(4, 4, seed=1)
    with invariant():
        assert torch.sum(a, 1, out=torch.empty(4, dtype=torch.float64)).dtype == torch.float64
        with pytest.raises(RuntimeError):
            torch.mm(a, b, out=torch.empty(4, 4, dtype=torch.int64))


def test_out_that_is_also_an_argument() -> None:
    """The result is complete before it is written."""
    a, b = rand(4, 4), rand(4, 4, seed=1)
    _, replacement = table().by_overload[aten.mm.out]
    mine = a.clone()
    replacement(mine, b, out=mine)
    close(mine, a @ b)
