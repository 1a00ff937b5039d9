"""Normalisations that a model's author or the compiler took apart are found, and only they."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import captured, close, rand, same_bits, targets
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table

from bi_compile.passes import PASSES
from bi_compile.rewrite import patterns
from bi_compile.rewrite.splice import Change, rewrite
from bi_compile.table import Pass, Table

EPS = 1e-6
STAGES = ("captured", "final")
each_stage = pytest.mark.parametrize("stage", STAGES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
Function = Callable[..., Any]


def graph(f: Function, *inputs: Tensor, stage: str, dynamic: bool = False) -> fx.GraphModule:
    """`f` as AOTAutograd captures it, or as Inductor's decompositions leave it."""
    return captured(f, *inputs, dynamic=dynamic, decompositions=select_decomp_table() if stage == "final" else {})


def matched(gm: fx.GraphModule, stage: str) -> list[str]:
    """Replace patterns alone; the names of those found, in the order of the passes."""
    changes: list[Change] = [c for p in PASSES for c in patterns.replace(gm.graph, p, stage)]
    gm.graph.lint()
    gm.recompile()
    return [c.operator for c in changes]


# -- models' own normalisations ---------------------------------------------------------------------------------------


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + EPS)).to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (y * (1.0 + weight.float())).type_as(x)


def qwen_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Over the head's dimension of queries, without casts."""
    heads = x.view(*x.shape[:-1], 4, -1)
    y = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + EPS)
    return (y * weight[: y.shape[-1]]).flatten(-2)


def twice(x: Tensor, weight: Tensor) -> Tensor:
    return llama(llama(x, weight) + x, weight)


def own_layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    return (((wide - mean) * torch.rsqrt(variance + EPS)) * weight).to(x.dtype)


def own_softmax(x: Tensor, weight: Tensor) -> Tensor:
    scores = (x * weight).float()
    e = torch.exp(scores - torch.amax(scores, -1, keepdim=True))
    return (e / torch.sum(e, -1, keepdim=True)).to(x.dtype)


def own_log_softmax(x: Tensor, weight: Tensor) -> Tensor:
    shifted = (x * weight).float()
    shifted = shifted - torch.amax(shifted, -1, keepdim=True)
    return shifted - torch.log(torch.sum(torch.exp(shifted), -1, keepdim=True))


WRITTEN: dict[Function, list[str]] = {
    llama: ["rms_norm"],
    gemma: ["rms_norm"],
    qwen_heads: ["rms_norm"],
    twice: ["rms_norm", "rms_norm"],
    own_layer_norm: ["layer_norm"],
    own_softmax: ["softmax"],
    own_log_softmax: ["log_softmax"],
}


@each_stage
@each_dtype
@pytest.mark.parametrize("f", WRITTEN, ids=lambda f: f.__name__)
def test_what_a_model_wrote_out_is_found(f: Function, dtype: torch.dtype, stage: str) -> None:
    """With the casts that models write around it; the values stay; no sum of PyTorch's is left."""
    x, w = rand(6, 64, dtype=dtype), rand(64, dtype=dtype, seed=1)
    gm = graph(f, x, w, stage=stage)
    assert matched(gm, stage) == WRITTEN[f]
    assert not {"aten.mean.dim", "aten.sum.dim_IntList", "aten.var_mean.correction"} & set(targets(gm.graph))
    close(gm(x, w), f(x, w))


@each_stage
@pytest.mark.parametrize("f", WRITTEN, ids=lambda f: f.__name__)
def test_it_is_found_with_symbolic_rows(f: Function, stage: str) -> None:
    w = rand(64, seed=1)
    gm = graph(f, rand(6, 3, 64), w, stage=stage, dynamic=True)
    assert matched(gm, stage) == WRITTEN[f]
    x = rand(9, 3, 64, seed=2)
    close(gm(x, w), f(x, w))


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """Of float32, the weight behind."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def adds(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x + x.abs()
    return llama(s, weight), s


def adds_first(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight is there only after the sum was used."""
    s = x + x.abs()
    return llama(s, weight + s.sum()), s


def another_shape(x: Tensor, weight: Tensor) -> Tensor:
    return llama(x + x[:1], weight[None])


@each_stage
@each_dtype
@pytest.mark.parametrize(
    "f, left",
    [
        (llama, {"bi_compile.rms_norm.default"}),
        (plain, {"bi_compile.rms_norm.default"}),
        (adds, {"aten.abs.default", "bi_compile.add_rms_norm.default"}),
        (adds_first, {"bi_compile.rms_norm.default", "aten.add.Tensor"}),
        (another_shape, {"bi_compile.rms_norm.default", "aten.add.Tensor", "aten.mul.Tensor"}),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_weight_cast_and_sum_go_into_the_operator(f: Function, left: set[str], dtype: torch.dtype, stage: str) -> None:
    """Where nothing else happens to them; with the bits that the operator has for the parts."""
    x, w = rand(6, 64, dtype=dtype), rand(64, dtype=dtype, seed=1)
    if f is plain and dtype != torch.float32:
        return  # in 16 bits each step is rounded: there is no such operator
    gm = graph(f, x, w, stage=stage)
    for _ in range(2):  # the norm, then the sum before it
        matched(gm, stage)
    gm.graph.eliminate_dead_code()
    assert left <= set(targets(gm.graph))
    if f in (llama, plain, adds):
        assert set(targets(gm.graph)) - {"<built-in function getitem>", "_operator.getitem", "getitem"} == left
    got, want = gm(x, w), by_parts(f, x, w)
    assert all(same_bits(g, t) for g, t in zip(as_tuple(got), as_tuple(want), strict=True))


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def by_parts(f: Function, x: Tensor, w: Tensor) -> Any:
    """f with the bare norm for its norm: cast and weight as the program writes them."""
    gm = graph(f, x, w, stage="final")
    bare = next(p.patterns[-1:] for p in PASSES if p.name == "rms_norm")

    class Bare(Pass):
        name, why, source, patterns = "bare", "a test", "a test", bare

    patterns.replace(gm.graph, Bare, "final")
    gm.recompile()
    return gm(x, w)


WHOLE: dict[str, tuple[Function, list[str]]] = {
    "softmax": (lambda x: torch.softmax(x, -1), ["softmax"]),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), ["log_softmax"]),
    "layer_norm": (lambda x: torch.nn.functional.layer_norm(x, [64]), ["layer_norm"]),
    "rms_norm": (lambda x: torch.nn.functional.rms_norm(x, [64], eps=EPS), ["rms_norm"]),
    "rms_norm of three dimensions": (
        lambda x: torch.nn.functional.rms_norm(x.view(2, 3, 64), [64], eps=EPS),
        ["rms_norm"],
    ),
    "layer_norm of three dimensions": (
        lambda x: torch.nn.functional.layer_norm(x.view(2, 3, 64), [64]),
        ["layer_norm"],
    ),
    "layer_norm and softmax": (
        lambda x: torch.softmax(torch.nn.functional.layer_norm(x, [64]), -1),
        ["layer_norm", "softmax"],
    ),
}


@each_dtype
@pytest.mark.parametrize("name", WHOLE)
def test_what_the_compiler_took_apart_is_found(name: str, dtype: torch.dtype) -> None:
    f, patterns_of_it = WHOLE[name]
    x = rand(6, 64, dtype=dtype)
    gm = graph(f, x, stage="final")
    assert matched(gm, "final") == patterns_of_it
    close(gm(x), f(x))


def plain(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def test_the_eps_is_the_graphs_own() -> None:
    x = rand(6, 64) * 1e-3
    for stage in STAGES:
        for eps in (1e-5, 1e-12, 0.5, 1):
            f = functools.partial(plain, eps=eps)
            gm = graph(f, x, stage=stage)
            assert matched(gm, stage) == ["rms_norm"]
            close(gm(x), f(x))


def test_the_change_names_pass_operator_and_line() -> None:
    x = rand(6, 64)
    gm = graph(lambda x: llama(x, x), x, stage="captured")
    for node in gm.graph.nodes:
        node.meta["stack_trace"] = '  File "model.py", line 3, in norm\n    y\n'
    (change,) = [c for p in PASSES for c in patterns.replace(gm.graph, p, "captured")]
    assert (change.pass_name, change.operator, change.by) == ("rms_norm", "rms_norm", ("bi_compile.rms_norm.default",))
    assert change.where == "model.py, line 3, in norm"


@each_stage
def test_a_row_of_a_found_pattern_is_its_own(stage: str) -> None:
    """Row 0 alone and among others, bit for bit."""
    for f in WRITTEN:
        x, w = rand(33, 192), rand(192, seed=1)
        gm = graph(f, rand(6, 192), w, stage=stage, dynamic=True)
        assert matched(gm, stage) == WRITTEN[f]
        for n in (2, 3, 17, 33):
            assert same_bits(gm(x[:n], w)[0][1:2], gm(x[1:3], w)[0][:1]), (f.__name__, n)


# -- near misses ------------------------------------------------------------------------------------------------------

NEAR: dict[str, Function] = {
    "mean over another dimension": lambda x, y: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS),
    "mean over two dimensions": lambda x, y: x * torch.rsqrt(x.pow(2).mean([0, -1], keepdim=True) + EPS),
    "no eps": lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "cubes": lambda x, y: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + EPS),
    "fourth powers": lambda x, y: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS),
    "another tensor's norm": lambda x, y: x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS),
    "norm of another tensor": lambda x, y: y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "not kept": lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1) + EPS),
    "sum instead of mean": lambda x, y: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "root instead of its inverse": lambda x, y: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "eps scaled": lambda x, y: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1.0, alpha=3)),
    "mean of another dtype": lambda x, y: (
        x * torch.rsqrt(torch.mean(x.pow(2), -1, keepdim=True, dtype=torch.float64) + EPS)
    ),
    "softmax with a sum of another dtype": lambda x, y: _softmax(x, x, -1, dtype=torch.float64),
    "softmax over rows": lambda x, y: _softmax(x, x, 0),
    "softmax over all": lambda x, y: _softmax(x, x, [0, 1]),
    "softmax with another divisor": lambda x, y: (
        torch.exp(x - x.amax(-1, keepdim=True)) / torch.exp(y - y.amax(-1, keepdim=True)).sum(-1, keepdim=True)
    ),
    "softmax with another maximum": lambda x, y: _softmax(x, y, -1),
    "softmax of twos": lambda x, y: (
        torch.exp2(x - x.amax(-1, keepdim=True)) / torch.exp2(x - x.amax(-1, keepdim=True)).sum(-1, keepdim=True)
    ),
    "log_softmax over rows": lambda x, y: (
        (x - x.amax(0, keepdim=True)) - torch.log(torch.exp(x - x.amax(0, keepdim=True)).sum(0, keepdim=True))
    ),
    "layer_norm over rows": lambda x, y: _layer_norm(x, 0, 0, True),
    "layer_norm with the unbiased variance": lambda x, y: _layer_norm(x, -1, 1, True),
    "layer_norm not kept": lambda x, y: _layer_norm(x, -1, 0, False),
}


def _softmax(x: Tensor, of: Tensor, dim: Any, dtype: torch.dtype | None = None) -> Tensor:
    e = torch.exp(x - torch.amax(of, dim, keepdim=True))
    return e / torch.sum(e, dim, keepdim=True, dtype=dtype)


def _layer_norm(x: Tensor, dim: int, correction: int, keepdim: bool) -> Tensor:
    variance, mean = torch.var_mean(x, dim=dim, correction=correction, keepdim=keepdim)
    return (x - mean) * torch.rsqrt(variance + EPS)


@each_stage
@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_left_to_the_other_passes(name: str, stage: str) -> None:
    """It is no pattern; what it sums up is then replaced operator by operator, and its values stay."""
    f, x, y = NEAR[name], rand(8, 8), rand(8, 8, seed=1)
    gm = graph(f, x, y, stage=stage)
    assert matched(gm, stage) == []
    by = Table(PASSES, "cpu")
    changes = [
        c for p in PASSES for c in rewrite(gm.graph, by, p.name, select_decomp_table() if stage == "final" else None)
    ]
    assert changes
    gm.recompile()
    close(gm(x, y), f(x, y))


@each_stage
def test_an_intermediate_that_is_used_elsewhere_keeps_its_value(stage: str) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x * rstd, rstd

    x = rand(6, 64)
    gm = graph(f, x, stage=stage)
    matched(gm, stage)
    close(gm(x), f(x))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Inductor's matcher counts what it did; a test's counts are its own."""
    from torch._dynamo.utils import counters

    yield
    counters.clear()


def test_an_rms_norm_that_pytorch_takes_apart_is_found_as_captured() -> None:
    """On a CPU `torch.nn.functional.rms_norm` reaches the compiler in pieces."""
    x = rand(6, 64, dtype=torch.bfloat16)
    gm = graph(lambda x: torch.nn.functional.rms_norm(x, [64], eps=EPS), x, stage="captured")
    assert matched(gm, "captured") == ["rms_norm"]
    close(gm(x), torch.nn.functional.rms_norm(x, [64], eps=EPS))
