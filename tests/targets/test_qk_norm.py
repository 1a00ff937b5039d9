"""Norms of a token's queries and keys are joined where they lie in one row, with the same bits; others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import traced_rows
from torch import Tensor
from torch._inductor import config as inductor

from bi_compile import Options, Pipeline, ops
from bi_compile.targets.qk_norm import join_norms

X = torch.randn(5, 9 * 16, dtype=torch.bfloat16)
Q, K = torch.randn(2, 16, dtype=torch.bfloat16)


def norms(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = x.mul(2).split([64, 48, 32], 1)
    return ops.rms_norm(a.view(-1, 4, 16), q, 1e-6)[0] + 1, ops.rms_norm(b.view(-1, 3, 16), k, 1e-6)[0], c


def first_the_keys(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    heads = x.mul(2).view(-1, 9, 16)
    b = ops.rms_norm(heads[:, 4:7], k, 1e-6)[0]
    return ops.rms_norm(heads[:, :4], q, 1e-6)[0] - 1, b


@pytest.mark.parametrize("f", [norms, first_the_keys])
@pytest.mark.parametrize("rows", [5, 2, 1])
def test_neighbours_are_joined(f: Callable[..., Any], rows: int) -> None:
    graph = traced_rows(f, X, Q, K)
    assert join_norms(graph.graph) == 1
    graph.graph.lint()
    graph.recompile()
    targets = [str(n.target) for n in graph.graph.nodes]
    assert targets.count("bi_compile.qk_norm.default") == 1
    assert "bi_compile.rms_norm.default" not in targets
    for got, want in zip(graph(X[:rows], Q, K), f(X[:rows], Q, K), strict=True):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16)) and got.stride() == want.stride()


def _the_statistic(x: Tensor, q: Tensor, k: Tensor) -> Any:
    a, b, _ = x.mul(2).split([64, 48, 32], 1)
    return ops.rms_norm(a.view(-1, 4, 16), q, 1e-6), ops.rms_norm(b.view(-1, 3, 16), k, 1e-6)[0]


def _two_products(x: Tensor, q: Tensor, k: Tensor) -> Any:
    return ops.rms_norm(x[:, :64].mul(2).view(-1, 4, 16), q, 1e-6)[0], ops.rms_norm(
        x[:, :48].mul(3).view(-1, 3, 16), k, 1e-6
    )[0]


def _a_gap(x: Tensor, q: Tensor, k: Tensor) -> Any:
    heads = x.mul(2).view(-1, 9, 16)
    return ops.rms_norm(heads[:, :4], q, 1e-6)[0], ops.rms_norm(heads[:, 5:7], k, 1e-6)[0]


def _two_eps(x: Tensor, q: Tensor, k: Tensor) -> Any:
    heads = x.mul(2).view(-1, 9, 16)
    return ops.rms_norm(heads[:, :4], q, 1e-6)[0], ops.rms_norm(heads[:, 4:7], k, 1e-5)[0]


def _two_dtypes(x: Tensor, q: Tensor, k: Tensor) -> Any:
    heads = x.mul(2).view(-1, 9, 16)
    return ops.rms_norm(heads[:, :4], q, 1e-6)[0], ops.rms_norm(heads[:, 4:7], k.float(), 1e-6)[0]


def _no_weight(x: Tensor, q: Tensor, k: Tensor) -> Any:
    heads = x.mul(2).view(-1, 9, 16)
    return ops.rms_norm(heads[:, :4], None, 1e-6)[0], ops.rms_norm(heads[:, 4:7], None, 1e-6)[0]


def _a_weight_of_the_other(x: Tensor, q: Tensor, k: Tensor) -> Any:
    heads = x.mul(2).view(-1, 9, 16)
    a = ops.rms_norm(heads[:, :4], q, 1e-6)[0]
    return a, ops.rms_norm(heads[:, 4:7], a[0, 0] * k, 1e-6)[0]


def _written_between(x: Tensor, q: Tensor, k: Tensor) -> Any:
    row = x.mul(2)
    heads = row.view(-1, 9, 16)
    a = ops.rms_norm(heads[:, :4], q, 1e-6)[0]
    row.add_(1)
    return a, ops.rms_norm(heads[:, 4:7], k, 1e-6)[0]


@pytest.mark.parametrize(
    "f",
    [
        _written_between,
        _the_statistic,
        _two_products,
        _a_gap,
        _two_eps,
        _two_dtypes,
        _no_weight,
        _a_weight_of_the_other,
    ],
)
def test_others_stay(f: Callable[..., Any]) -> None:
    graph = traced_rows(f, X, Q, K)
    assert join_norms(graph.graph) == 0
    assert sum(str(n.target) == "bi_compile.rms_norm.default" for n in graph.graph.nodes) == 2


@pytest.mark.parametrize("f", [norms, first_the_keys])
def test_inductor_compiles_the_join(f: Callable[..., Any]) -> None:
    joined = []
    with inductor.patch(post_grad_custom_post_pass=lambda graph: joined.append(join_norms(graph))):
        got = torch.compile(f, fullgraph=True)(X, Q, K)
    assert joined == [1]
    for g, want in zip(got, f(X, Q, K), strict=True):
        assert torch.equal(g.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize(("target", "joined"), [("cuda", 1), ("cpu", 0)])
def test_the_pipeline_joins_what_its_passes_made(target: str, joined: int) -> None:
    """The norms of a graph are PyTorch's until the last pass is done."""
    graph = traced_rows(norms, X, Q, K).graph
    for node in graph.nodes:
        if node.target is torch.ops.bi_compile.rms_norm.default:
            x, weight, eps = node.args
            node.target, node.args = torch.ops.aten._fused_rms_norm.default, (x, [16], weight, eps)
    Pipeline(Options(target=target)).rewrite(graph, "final")
    targets = [str(n.target) for n in graph.nodes]
    assert targets.count("bi_compile.qk_norm.default") == joined
    assert targets.count("bi_compile.rms_norm.default") == 2 * (1 - joined)
