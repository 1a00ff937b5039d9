"""Each replacement means what its operator means, on fixed and on symbolic shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
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

from bi_compile import RewriteError
from bi_compile.passes import PASSES
from bi_compile.passes.pointwise import Pointwise
from bi_compile.passes.recurrent import Recurrent
from bi_compile.passes.ties import Ties
from bi_compile.passes.writes import Writes
from bi_compile.rewrite.splice import rewrite
from bi_compile.table import Entry, Table, find_operator

aten = torch.ops.aten
#: the size that becomes a symbol in the tests of symbolic shapes, and a second one; nothing else has them
BATCH, OTHER = 5, 11
Case = tuple[str, tuple[Any, ...], dict[str, Any]]


def dims_of(rank: int) -> list[Any]:
    return [0, -1, [0], [-1], [1], list(range(rank)), [-1, 0], None, []]


def reductions(dtype: torch.dtype, n: int) -> Iterator[Case]:
    x = rand(n, 7, 6, dtype=dtype)
    permuted = rand(6, 7, n, dtype=dtype).permute(2, 1, 0)
    scalar, empty, hollow = rand(dtype=dtype), rand(0, 6, dtype=dtype), rand(n, 0, dtype=dtype)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    for name in ("sum", "mean"):
        yield f"aten.{name}.default", (x,), {}
        yield f"aten.{name}.default", (scalar,), {}
        yield f"aten.{name}.default", (x,), {"dtype": wider}
        yield f"aten.{name}.default", (hollow,), {}
        overload = {"sum": "aten.sum.dim_IntList", "mean": "aten.mean.dim"}[name]
        for dim in dims_of(3):
            yield overload, (x, dim if dim is None or isinstance(dim, list) else [dim]), {}
            yield overload, (permuted, dim if dim is None or isinstance(dim, list) else [dim], True), {}
        yield overload, (x, [1], False), {"dtype": wider}
        yield overload, (x, [-2, 2], True), {"dtype": torch.float64}
        for tensor, dim in (
            (scalar, None),
            (scalar, []),
            (scalar, [0]),
            (scalar, [-1]),
            (empty, [0]),
            (empty, [1]),
            (hollow, [1]),
        ):
            yield overload, (tensor, dim), {}
    holes = torch.where(x > 1, torch.nan, x)
    yield "aten.nansum.default", (holes,), {}
    for dim in ([0], [-1, 0], None):
        yield "aten.nansum.default", (holes, dim, True), {}
    yield "aten.nansum.default", (holes, [1]), {"dtype": wider}
    yield "aten.nansum.default", (scalar, None), {}
    for name in ("var_mean", "std_mean", "var", "std"):
        op = f"aten.{name}.correction"
        yield op, (x,), {}
        for dim in dims_of(3):
            yield op, (x, dim if dim is None or isinstance(dim, list) else [dim]), {"keepdim": dim in ([0], None)}
        for correction in (0, 1, 2, 0.5, None):
            yield op, (permuted, [1]), {"correction": correction}
        yield op, (rand(4, 1, dtype=dtype), [1]), {"correction": 0}
        yield op, (scalar, None), {"correction": 0}
        yield op, (empty, [1]), {}
    for p in (2, 1, 0, 3, 0.5, -1, float("inf"), float("-inf")):
        yield "aten.linalg_vector_norm.default", (x, p, [-1]), {}
        yield "aten.linalg_vector_norm.default", (permuted, p, [0, 2], True), {}
        yield "aten.linalg_vector_norm.default", (x, p, None), {}
        yield "aten.norm.ScalarOpt_dim", (x, p, [1], True), {}
        yield "aten.norm.Scalar", (x, p), {}
    yield "aten.linalg_vector_norm.default", (x,), {}
    yield "aten.linalg_vector_norm.default", (x, 2, []), {}
    yield "aten.linalg_vector_norm.default", (scalar, 2, None), {}
    yield "aten.linalg_vector_norm.default", (scalar, 3, None, True), {}
    yield "aten.linalg_vector_norm.default", (empty, 2, [0]), {}
    yield "aten.norm.ScalarOpt_dim", (x, None, [1]), {}
    yield "aten.norm.ScalarOpt_dim", (x, 2, []), {}
    yield "aten.norm.ScalarOpt_dim", (x, 2, [-1, 0]), {}
    if torch.promote_types(dtype, wider) == wider:
        yield "aten.linalg_vector_norm.default", (x, 2, [1]), {"dtype": wider}
        yield "aten.norm.ScalarOpt_dim_dtype", (x, 2, [1], False), {"dtype": wider}
        yield "aten.norm.ScalarOpt_dim_dtype", (x, None, [-1, 0], True), {"dtype": wider}
    for dim in ([0], [-1], [1, 2], [-1, 0]):
        yield "aten.logsumexp.default", (x, dim), {}
        yield "aten.logsumexp.default", (permuted, dim, True), {}
    yield "aten.logsumexp.default", (torch.full((3, 4), -torch.inf, dtype=dtype), [1]), {}
    yield "aten.logsumexp.default", (scalar, [0]), {}
    yield "aten.logsumexp.default", (empty, [1]), {}
    for dim in (0, 1, -1):
        yield "aten.cumsum.default", (x, dim), {}
        yield "aten.cumsum.default", (permuted, dim), {}
    yield "aten.cumsum.default", (x, 1), {"dtype": wider}
    yield "aten.cumsum.default", (scalar, 0), {}
    yield "aten.cumsum.default", (empty, 0), {}


def softmaxes(dtype: torch.dtype, n: int) -> Iterator[Case]:
    x = rand(n, 7, 6, dtype=dtype)
    permuted = rand(6, 7, n, dtype=dtype).permute(2, 1, 0)
    dead = torch.where(torch.arange(6) < 9, -torch.inf, x)
    for name in ("_softmax", "_log_softmax"):
        for dim in (0, 1, 2, -1, -3):
            yield f"aten.{name}.default", (x, dim, False), {}
        yield f"aten.{name}.default", (permuted, 1, False), {}
        yield f"aten.{name}.default", (rand(dtype=dtype), 0, False), {}
        yield f"aten.{name}.default", (rand(dtype=dtype), -1, False), {}
        yield f"aten.{name}.default", (rand(0, 4, dtype=dtype), 1, False), {}
        yield f"aten.{name}.default", (rand(4, 0, dtype=dtype), 1, False), {}
    for dim in (0, -1):
        yield "aten._safe_softmax.default", (x, dim), {}
        yield "aten._safe_softmax.default", (dead, dim), {}
    yield "aten._safe_softmax.default", (x, -1, torch.float64), {}
    yield "aten._safe_softmax.default", (dead, -1, torch.float32), {}


def norms(dtype: torch.dtype, n: int) -> Iterator[Case]:
    x = rand(n, 7, 6, dtype=dtype)
    permuted = rand(6, 7, n, dtype=dtype).permute(2, 1, 0)
    for shape in ([6], [7, 6], [n, 7, 6]):
        w, b = rand(*shape, dtype=dtype, seed=1), rand(*shape, dtype=dtype, seed=2)
        for weight, bias in ((w, b), (w, None), (None, b), (None, None)):
            yield "aten.native_layer_norm.default", (x, shape, weight, bias, 1e-5), {}
        yield "aten._fused_rms_norm.default", (x, shape, w, 1e-5), {}
        yield "aten._fused_rms_norm.default", (x, shape, None, None), {}
    yield "aten.native_layer_norm.default", (permuted, [6], None, None, 1e-5), {}
    yield "aten.native_layer_norm.default", (rand(0, 6, dtype=dtype), [6], None, None, 1e-5), {}
    yield "aten._fused_rms_norm.default", (permuted, [6], None, 1e-5), {}
    image = rand(n, 8, 3, 2, dtype=dtype)
    w, b = rand(8, dtype=dtype, seed=1), rand(8, dtype=dtype, seed=2)
    for groups in (1, 2, 8):
        yield "aten.native_group_norm.default", (image, w, b, n, 8, 6, groups, 1e-5), {}
    yield "aten.native_group_norm.default", (image, None, None, n, 8, 6, 4, 1e-5), {}
    yield (
        "aten.native_group_norm.default",
        (image.contiguous(memory_format=torch.channels_last), w, b, n, 8, 6, 4, 1e-5),
        {},
    )
    yield "aten.native_group_norm.default", (rand(n, 8, dtype=dtype), w, None, n, 8, 1, 4, 1e-5), {}


def products(dtype: torch.dtype, n: int) -> Iterator[Case]:
    a, b, c = rand(n, 7, dtype=dtype), rand(7, 6, dtype=dtype, seed=1), rand(n, 6, dtype=dtype, seed=2)
    p, q, r = rand(n, 3, 7, dtype=dtype), rand(n, 7, 6, dtype=dtype, seed=1), rand(n, 3, 6, dtype=dtype, seed=2)
    v, w = rand(7, dtype=dtype, seed=3), rand(n, dtype=dtype, seed=4)
    yield "aten.mm.default", (a, b), {}
    yield "aten.mm.default", (rand(7, n, dtype=dtype).t(), rand(6, 7, dtype=dtype).t()), {}
    yield "aten.mm.default", (rand(0, 7, dtype=dtype), b), {}
    yield "aten.mm.default", (rand(n, 0, dtype=dtype), rand(0, 6, dtype=dtype)), {}
    for bias in (c, c[0], c[:, :1], c[0, 0], c[:1]):
        yield "aten.addmm.default", (bias, a, b), {}
    yield "aten.addmm.default", (c, a, b), {"beta": 0.5, "alpha": 2}
    yield "aten.addmm.default", (torch.full_like(c, torch.nan), a, b), {"beta": 0}
    yield "aten.addmm.default", (c, rand(n, 0, dtype=dtype), rand(0, 6, dtype=dtype)), {"beta": 0.5}
    yield "aten.bmm.default", (p, q), {}
    yield "aten.bmm.default", (p, rand(n, 6, 7, dtype=dtype).transpose(1, 2)), {}
    yield "aten.bmm.default", (rand(0, 3, 7, dtype=dtype), rand(0, 7, 6, dtype=dtype)), {}
    for bias in (r, r[0], r[:, :1], r[0, 0]):
        yield "aten.baddbmm.default", (bias, p, q), {}
    yield "aten.baddbmm.default", (r, p, q), {"beta": 0.5, "alpha": 2}
    yield "aten.baddbmm.default", (torch.full_like(r, torch.nan), p, q), {"beta": 0}
    if dtype == torch.bfloat16:
        ends = torch.tensor([2, 2, n], dtype=torch.int32)
        yield "aten._grouped_mm.default", (rand(n, 8, dtype=dtype), rand(3, 8, 16, dtype=dtype), ends), {}
        columns = rand(3, 16, 8, dtype=dtype).transpose(1, 2)
        yield "aten._grouped_mm.default", (rand(n, 8, dtype=dtype), columns, ends), {"out_dtype": dtype}
        yield "aten._grouped_mm.default", (rand(n, 5, 8, dtype=dtype), rand(n, 8, 16, dtype=dtype)), {}
    if dtype != torch.bfloat16:  # PyTorch rounds to it after each product of the batch
        yield "aten.addbmm.default", (r[0], p, q), {}
        yield "aten.addbmm.default", (r[0, 0], p, q), {"beta": 0.5, "alpha": 2}
        yield "aten.addbmm.default", (r[0], rand(0, 3, 7, dtype=dtype), rand(0, 7, 6, dtype=dtype)), {}
    yield "aten.mv.default", (a, v), {}
    yield "aten.mv.default", (rand(0, 7, dtype=dtype), v), {}
    yield "aten.addmv.default", (w, a, v), {}
    yield "aten.addmv.default", (w[:1], a, v), {"beta": 0.5, "alpha": 2}
    yield "aten.addmv.default", (w[0], a, v), {}
    yield "aten.dot.default", (v, rand(7, dtype=dtype, seed=5)), {}
    yield "aten.dot.default", (rand(0, dtype=dtype), rand(0, dtype=dtype)), {}
    weight = rand(6, 7, dtype=dtype, seed=1)
    for x in (v, a, p, p[:, None], rand(0, 7, dtype=dtype), p.transpose(0, 1)):
        yield "aten.linear.default", (x, weight), {}
        yield "aten.linear.default", (x, weight, rand(6, dtype=dtype, seed=2)), {}
    yield "aten.linear.default", (a, v), {}
    pairs = (
        (v, v), (a, v), (v, b), (a, b), (p, v), (v, q), (p, b), (a, q), (p, q), (p[:, None], q), (p, q[:, None]),
        (p[:1], q), (p, q[:1]), (v, q[:, None]),
        (rand(0, 7, dtype=dtype), b), (rand(0, 3, 7, dtype=dtype), b), (p.transpose(0, 1), b),
    )  # fmt: skip
    for x, y in pairs:
        yield "aten.matmul.default", (x, y), {}


def attentions(dtype: torch.dtype, n: int) -> Iterator[Case]:
    q, k, v = (rand(n, 4, length, 8, dtype=dtype, seed=length) for length in (6, 9, 9))
    few = rand(n, 2, 9, 8, dtype=dtype, seed=1)
    mask = rand(6, 9) > 0
    mask[:, 0] = True
    sdpa = "aten.scaled_dot_product_attention.default"
    yield sdpa, (q, k, v), {}
    yield sdpa, (q, k, v), {"is_causal": True}
    yield sdpa, (q, k, v), {"scale": 0.3}
    yield sdpa, (q, k, v, mask), {}
    yield sdpa, (q, k, v, mask.expand(n, 1, 6, 9)), {}
    yield sdpa, (q, k, v, rand(n, 4, 6, 9, dtype=dtype)), {}
    yield sdpa, (q, few, few), {"enable_gqa": True}
    yield sdpa, (q[0], k[0], v[0]), {}
    yield sdpa, (q[0], k[0], v[0], mask), {}
    yield sdpa, (q[0, 0], k[0, 0], v[0, 0]), {}
    yield sdpa, (q[None], k[None], v[None], mask), {}
    yield sdpa, (q[0, 0], k[0, 0], v[0, 0], mask), {}
    yield sdpa, (q, k[0], v[:1], mask), {}
    yield sdpa, (q, k[:, :1], v[:, :1]), {}
    yield sdpa, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {}
    yield sdpa, (q, k, rand(n, 4, 9, 3, dtype=dtype)), {}
    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    yield flash, (q, k, v), {}
    yield flash, (q, k, v, 0.0, True), {"scale": 0.3}
    yield flash, (q, k, v), {"attn_mask": rand(n, 1, 6, 9, dtype=dtype)}


def convolutions(dtype: torch.dtype, n: int) -> Iterator[Case]:
    op = "aten.convolution.default"
    for places in ([3], [3, 2], [2, 1, 3]):
        one = [1] * len(places)
        x, w, b = (
            rand(n, 4, *[9, 7, 6][: len(places)], dtype=dtype),
            rand(6, 4, *places, dtype=dtype),
            rand(6, dtype=dtype),
        )
        yield op, (x, w, b, one, [0], one, False, [0], 1), {}
        yield op, (x, w, None, [2], one, [2], False, [0], 1), {}
        yield op, (x, w[:, :2], b, one, one, one, False, [0], 2), {}
        yield op, (x, w[:4, :1], None, [2], one, one, False, [0], 4), {}
        yield op, (x, rand(4, 3, *places, dtype=dtype), b, [2], one, one, True, one, 2), {}
        yield op, (x, rand(4, 3, *places, dtype=dtype), None, one, [2], [2], True, [0], 1), {}
        yield op, (rand(0, 4, *x.shape[2:], dtype=dtype), w, b, one, [0], one, False, [0], 1), {}
    image = rand(n, 4, 9, 8, dtype=dtype)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    yield op, (channels_last, rand(6, 4, 3, 3, dtype=dtype), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {}
    for x in (image, image[0], channels_last):
        yield "aten.avg_pool2d.default", (x, [3]), {}
        yield "aten.avg_pool2d.default", (x, [3, 2], [2, 1], [1, 0]), {}
        yield "aten.avg_pool2d.default", (x, [3, 2], [2, 1], [1, 1], False, False), {}
        yield "aten.avg_pool2d.default", (x, [3, 3], [1], [1], False, True, 3), {}
        for size in ([2, 3], [9, 8], [12, 7]):
            yield "aten._adaptive_avg_pool2d.default", (x, size), {}
    yield "aten._adaptive_avg_pool2d.default", (image, [1, 1]), {}
    if dtype in (torch.float32, torch.float64):
        yield "aten.avg_pool3d.default", (rand(n, 2, 6, 7, 4, dtype=dtype), [2], [2], [1], False, False), {}
    yield "aten._adaptive_avg_pool3d.default", (rand(n, 2, 6, 7, 4, dtype=dtype), [2, 2, 3]), {}


#: PyTorch has no CPU kernel for these: their outputs by place, and those that mean something
ON_ACCELERATORS = {
    "aten._scaled_dot_product_efficient_attention.default": (None, False),
    "aten._scaled_dot_product_flash_attention.default": (),
    "aten._scaled_dot_product_cudnn_attention.default": (None, True),
    "aten._scaled_dot_product_fused_attention_overrideable.default": (None,),
}
REFUSED = ("aten._scaled_mm.default", "aten._scaled_grouped_mm.default")

FAMILIES = {f.__name__: f for f in (reductions, softmaxes, norms, products, attentions, convolutions)}
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
each_family = pytest.mark.parametrize("family", FAMILIES)


def calls(family: str, dtype: torch.dtype, n: int = BATCH) -> list[Call]:
    return [(find_operator(name), args, kwargs) for name, args, kwargs in FAMILIES[family](dtype, n)]


def shown(call: Call) -> str:
    op, args, kwargs = call
    return f"{op}({', '.join(str(tuple(a.shape)) if isinstance(a, Tensor) else str(a) for a in args)}, {kwargs})"


def check(call: Call, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    try:
        close(got, want)
    except AssertionError as error:
        raise AssertionError(f"{shown(call)}: {error}") from error


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
        check(call, [real for real, _ in got], want)
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
        check(call, taken(call, outs), tensors(call[0](*call[1], **call[2])))


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
OF_COMPLEX = ("aten.angle.default", "aten.neg.default", "aten.sgn.default")


@pytest.mark.parametrize("name", OF_COMPLEX)
def test_a_function_of_complex_numbers_keeps_its_meaning(name: str) -> None:
    op = find_operator(name)
    for rows in (1, 30):
        x = torch.complex(rand(rows, 3), rand(rows, 3, seed=1))
        gm, inputs, _ = graph_of((op, (x,), {}))
        (change,) = rewrite(gm.graph, Table([Pointwise], "cpu_eager"), "pointwise")
        assert change.operator == name
        torch.testing.assert_close(run(gm, *inputs)[0], op(x))


@pytest.mark.parametrize(
    "entry", [e for e in Pointwise.entries if e.operator not in OF_COMPLEX], ids=lambda e: e.operator
)
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
