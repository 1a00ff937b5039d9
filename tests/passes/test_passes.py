"""Each replacement means what its operator means, on fixed and on symbolic shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from calls import BATCH, FAMILIES, OTHER, calls
from support import (
    FLOATS,
    Call,
    close,
    graph_of,
    rand,
    results,
    rewrite_all,
    run,
    table,
    targets,
    tensors,
    traced,
)
from torch import Tensor
from torch._ops import OpOverload

from bi_compile import RewriteError, invariant
from bi_compile.passes import PASSES
from bi_compile.passes.pointwise import POLYNOMIALS, Pointwise
from bi_compile.passes.recurrent import Recurrent
from bi_compile.passes.ties import Ties
from bi_compile.passes.writes import Writes
from bi_compile.rewrite.splice import rewrite
from bi_compile.table import Entry, Table, find_operator

aten = torch.ops.aten
#: PyTorch has no CPU kernel for these: their outputs by place, and those that mean something
ON_ACCELERATORS = {
    "aten._scaled_dot_product_efficient_attention.default": (None, False),
    "aten._scaled_dot_product_flash_attention.default": (),
    "aten._scaled_dot_product_cudnn_attention.default": (None, True),
    "aten._scaled_dot_product_fused_attention_overrideable.default": (None,),
}
REFUSED = ("aten._scaled_mm.default", "aten._scaled_grouped_mm.default")

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
each_family = pytest.mark.parametrize("family", FAMILIES)


def shown(call: Call) -> str:
    op, args, kwargs = call
    return f"{op}({', '.join(str(tuple(a.shape)) if isinstance(a, Tensor) else str(a) for a in args)}, {kwargs})"


def check(call: Call, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Equal but for the rounding of the operands: PyTorch's attention rounds on its way to a float32 logsumexp, by the processor."""
    of = call[1][0].dtype if isinstance(call[1][0], Tensor) else None
    coarse = of in (torch.bfloat16, torch.float16)
    try:
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype, (a.dtype, b.dtype)
            by = of if coarse and a.dtype == torch.float32 else a.dtype
            close([a.to(by)], [b.to(by)])
    except AssertionError as error:
        raise AssertionError(f"{shown(call)}: {error}") from error


def wanted(call: Call) -> Sequence[Tensor]:
    """What the operator itself gives; a convolution in 16 bits from float32, as some processors round within its sums."""
    op, args, kwargs = call
    if "conv" not in str(op) or args[0].dtype not in (torch.bfloat16, torch.float16):
        return tensors(op(*args, **kwargs))
    wide = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
    return [x.to(args[0].dtype) for x in tensors(op(*wide[0], **wide[1]))]


def taken(call: Call, outs: Iterator[Any]) -> list[Any]:
    """The outputs of one call from those of the whole graph, as many as the call has."""
    return list(itertools.islice(outs, len(tensors(call[0](*call[1], **call[2])))))


#: passes whose operators are tried below, in test_ties, in test_writes and in test_eager
OF_THEIR_OWN = (Pointwise, Ties, Writes, Recurrent)


def test_every_aten_operator_of_the_tables_is_tried() -> None:
    tried = (
        {
            str(op)
            for family in FAMILIES
            for dtype in (torch.float32, torch.bfloat16)
            for op, _, _ in calls(family, dtype)
        }
        | set(ON_ACCELERATORS)
        | set(REFUSED)
    )
    entries = [
        e.operator for p in PASSES for e in p.entries if e.operator.startswith("aten.") and p not in OF_THEIR_OWN
    ]
    assert set(entries) <= tried, set(entries) - tried


@each_dtype
@each_family
def test_a_replacement_means_what_its_operator_means(family: str, dtype: torch.dtype) -> None:
    """Values within rounding; dtype, shape and strides as the operator's; no operator of the table is left."""
    todo = calls(family, dtype)
    gm, inputs, _nodes = graph_of(*todo)
    before = [(v.dtype, v.shape, v.stride()) for v in results(gm.graph)]
    changes = rewrite_all(gm.graph)
    tried = {str(op) for op, _, _ in todo}
    assert len([c for c in changes if c.operator in tried]) == len(todo) and not tried & set(targets(gm.graph))
    after = results(gm.graph)
    assert [(v.dtype, v.shape, v.stride()) for v in after] == before
    outs = iter(zip(run(gm, *inputs), after, strict=True))
    for call in todo:
        got = taken(call, outs)
        want = tensors(call[0](*call[1], **call[2]))
        check(call, [real for real, _ in got], wanted(call))
        for (real, fake), original in zip(got, want, strict=True):
            assert real.stride() == fake.stride(), shown(call)
            assert real.stride() == original.stride() or not real.numel(), shown(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_family
def test_a_rewritten_graph_of_symbolic_shapes_serves_every_batch_size(family: str, dtype: torch.dtype) -> None:
    """Symbols stay symbols: traced with 5 rows, the graph is right for 11."""

    def symbolic(call: Call) -> bool:
        sizes = [leaf for leaf in pytree.tree_leaves(call[1:]) if type(leaf) is int]
        # PyTorch itself cannot trace a broadcast bias of baddbmm with symbols
        broadcast = str(call[0]) == "aten.baddbmm.default" and tuple(call[1][0].shape[1:]) != (3, 6)
        return not {BATCH, OTHER} & set(sizes) and not broadcast

    todo = [c for c in calls(family, dtype) if symbolic(c)]
    others = [c for c in calls(family, dtype, OTHER) if symbolic(c)]
    gm, _, _ = graph_of(*todo, dynamic=[BATCH])
    before = [(v.dtype, str(v.shape)) for v in results(gm.graph)]
    rewrite_all(gm.graph)
    assert [(v.dtype, str(v.shape)) for v in results(gm.graph)] == before
    outs = iter(run(gm, *tensors([c[1:] for c in others])))
    for call in others:
        check(call, taken(call, outs), wanted(call))


def arguments(op: OpOverload, dtype: torch.dtype, rows: int) -> Call:
    """A call of a pointwise operator on few elements between 0 and 1, numbers being 1.5, an alpha 2."""
    shapes = iter([(rows, 2), (rows, 2) if "backward" in op.name() else (2,), (2,)])
    args, kwargs = [], {}
    for a in op._schema.arguments:
        if "Tensor" in str(a.type):
            args.append(rand(*next(shapes), dtype=torch.float64).sigmoid().to(dtype))
        elif a.name == "alpha":
            kwargs["alpha"] = 2
        elif not a.has_default_value() and not a.kwarg_only:
            args.append(2 if str(a.type) == "int" else 1.5)
    return op, tuple(args), kwargs


def has_kernel(call: Call) -> bool:
    """Some have none for 16-bit types."""
    try:
        call[0](*call[1], **call[2])
    except (RuntimeError, NotImplementedError) as error:
        assert "not implemented for" in str(error) or "not supported" in str(error)
        return False
    return True


#: replaced for complex numbers alone
OF_COMPLEX = [e for e in Pointwise.entries if getattr(e.unless, "__name__", "") == "_not_complex"]


@pytest.mark.parametrize("entry", OF_COMPLEX, ids=lambda e: e.operator)
def test_a_function_of_complex_numbers_keeps_its_meaning(entry: Entry) -> None:
    op = find_operator(entry.operator)
    required = [a for a in op._schema.arguments if not a.has_default_value()]
    for rows, target in itertools.product((1, 30), entry.targets):
        fresh = (torch.complex(rand(rows, 3, seed=i), rand(rows, 3, seed=i + 1)) for i in itertools.count())
        args = tuple(next(fresh) if "Tensor" in str(a.type) else 0.3 for a in required)
        gm, inputs, _ = graph_of((op, args, {}))
        (change,) = rewrite(gm.graph, Table([Pointwise], target), "pointwise")
        assert change.operator == entry.operator
        torch.testing.assert_close(run(gm, *inputs)[0], op(*args))


def test_a_complex_number_beside_tensors_is_taken_or_refused() -> None:
    x = rand(30, 3)
    with invariant():
        torch.testing.assert_close((x * 2j).imag, 2 * x)
        with pytest.raises(NotImplementedError, match="exponent=2j has no invariant form: give it as a tensor"):
            torch.pow(x, 2j)


def test_a_polynomial_of_nan_is_nan() -> None:
    """PyTorch's own gives the value of the element before, compiled and not."""
    nan = torch.tensor([0.3, torch.nan, -1.7, torch.nan, 2.0] * 8)

    def polynomials(x: Tensor) -> list[Tensor]:
        found = [getattr(aten, name) for name in POLYNOMIALS]
        return [y for f in found for y in (f(x, 3), f(x, torch.tensor(3.0)), f(x, torch.full_like(x, 4)))]

    assert not all(torch.equal(y.isnan(), nan.isnan()) for y in polynomials(nan))
    compiled = torch.compile(polynomials, backend="bi_ascend", options={"inner": "eager"})
    with invariant():
        eager = polynomials(nan)
    for a, b in zip(compiled(nan), eager, strict=True):
        assert torch.equal(a.isnan(), nan.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("entry", [e for e in Pointwise.entries if e not in OF_COMPLEX], ids=lambda e: e.operator)
def test_a_pointwise_function_keeps_its_meaning(entry: Entry) -> None:
    """On each target where it is replaced; dtype, shape and values, of broadcast arguments too."""
    assert entry.op is not None
    replaced = []
    for target in entry.targets or ("cpu",):
        for dtype, rows in itertools.product(FLOATS, (1, 30)):
            call = arguments(entry.op, dtype, rows)
            if not has_kernel(call):
                continue
            gm, inputs, (node,) = graph_of(call)
            replaced += rewrite(gm.graph, Table([Pointwise], target), "pointwise")
            value = results(gm.graph)[0]
            assert (value.dtype, value.shape) == (node.meta["val"].dtype, node.meta["val"].shape)
            check(call, run(gm, *inputs), [call[0](*call[1], **call[2])])
    assert {c.operator for c in replaced} == {entry.operator}


@pytest.mark.parametrize("name", ON_ACCELERATORS)
def test_attention_of_accelerators(name: str) -> None:
    """The output and the logsumexp are attention's; every output has the operator's dtype and size."""
    q, k, v = (rand(3, 4, n, 16, seed=n) for n in (40, 9, 9))
    gm, inputs, (node,) = graph_of((find_operator(name), (q, k, v, *ON_ACCELERATORS[name]), {"scale": 0.3}))
    want = [(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in node.meta["val"]]
    (change,) = rewrite_all(gm.graph)
    assert change.by[0] == "bi_compile.scaled_dot_product_attention.default"
    got = run(gm, *inputs)
    tensor_shapes = [w for w in want if isinstance(w, tuple)]
    assert [(x.dtype, x.shape) for x in got] == tensor_shapes
    scores = q @ k.transpose(-1, -2) * 0.3
    close(got[0], scores.softmax(-1) @ v)
    if got[1].numel():
        close(got[1].reshape(3, 4, -1)[..., :40], scores.logsumexp(-1))


@pytest.mark.parametrize("flash", [False, True])
def test_dropout_is_refused(flash: bool) -> None:
    q = rand(2, 2, 4, 8)
    op = (
        aten._scaled_dot_product_flash_attention_for_cpu.default if flash else aten.scaled_dot_product_attention.default
    )
    gm, _, _ = graph_of((op, (q, q, q, *(() if flash else (None,)), 0.5), {}))
    with pytest.raises(
        RewriteError, match=r"pass 'attention', node .*model.py, line 7.*dropout_p=0.5.*use dropout_p=0"
    ):
        rewrite_all(gm.graph)


def test_float8_products_are_refused_by_name() -> None:
    a, b = rand(32, 32).to(torch.float8_e4m3fn), rand(32, 32).to(torch.float8_e4m3fn).t()
    one = torch.ones(())
    gm, _, _ = graph_of((aten._scaled_mm.default, (a, b, one, one), {"out_dtype": torch.bfloat16}))
    with pytest.raises(
        RewriteError,
        match=r"pass 'matmul', node _scaled_mm_default \(aten._scaled_mm.default, model.py.*float8 operands has no invariant form",
    ):
        rewrite_all(gm.graph)
    for name in REFUSED:
        _, replacement = table().by_overload[find_operator(name)]
        with pytest.raises(NotImplementedError, match="serve the model in bfloat16"):
            replacement()


def test_a_grouped_product_over_groups_of_k_is_refused_by_name() -> None:
    a, b, ends = (
        rand(8, 16, dtype=torch.bfloat16),
        rand(16, 8, dtype=torch.bfloat16),
        torch.tensor([8, 16], dtype=torch.int32),
    )
    gm, _, _ = graph_of((aten._grouped_mm.default, (a, b, ends), {}))
    with pytest.raises(
        RewriteError, match=r"aten._grouped_mm.default.*offs that divides K has no invariant form.*call torch.mm"
    ):
        rewrite_all(gm.graph)


@pytest.mark.parametrize("op", [aten.sum.default, aten.mm.default], ids=str)
def test_complex_numbers_are_refused_by_name(op: Any) -> None:
    x = torch.ones(4, 4, dtype=torch.complex64)
    gm, _, _ = graph_of((op, (x, x) if op is aten.mm.default else (x,), {}))
    with pytest.raises(RewriteError, match=r"no kernel for torch\.complex64: use float32"):
        rewrite_all(gm.graph)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_normalisation_with_wider_parameters(dtype: torch.dtype) -> None:
    """A graph's statistics have the dtype of PyTorch's fake implementation, a call's that of its kernel."""
    x, w = rand(4, 8, 3, dtype=dtype), rand(3, seed=1)
    todo: list[Call] = [
        (aten.native_layer_norm.default, (x, [3], w, w, 1e-5), {}),
        (aten.native_group_norm.default, (x, rand(8), rand(8), 4, 8, 3, 2, 1e-5), {}),
    ]
    gm, inputs, nodes = graph_of(*todo)
    rewrite_all(gm.graph)
    got = run(gm, *inputs)
    assert [t.dtype for t in got] == [t.dtype for n in nodes for t in n.meta["val"]]
    for i, (op, args, _) in enumerate(todo):
        want = op(*args)
        close(got[3 * i], want[0])
        _, replacement = table().by_overload[op]
        close(replacement(*args), want)


def test_the_users_program_keeps_its_meaning() -> None:
    """A captured model: linear, layer norm, softmax, products and sums, over symbolic rows."""

    def model(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = torch.nn.functional.layer_norm(torch.nn.functional.linear(x, w, b), [12])
        a = torch.softmax(h @ h.transpose(-1, -2), -1) @ h
        return a.var(-1) + torch.linalg.vector_norm(a, dim=-1) + a.cumsum(-1).mean(-1) + torch.logsumexp(a, -1)

    w, b = rand(12, 8, seed=1), rand(12, seed=2)
    gm = traced(model, rand(BATCH, 3, 8), w, b, dynamic=True)
    assert len(rewrite_all(gm.graph)) >= 8
    x = rand(OTHER, 3, 8, seed=3)
    close(run(gm, x, w, b), model(x, w, b))
