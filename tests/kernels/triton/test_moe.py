"""The gate and the sum over a token's experts: bit for bit what their definitions in `ops.moe` say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import CUDA, DEVICE, draw, same

from bi_compile.kernels.ascend import triton_kernels
from bi_compile.kernels.triton import launch
from bi_compile.ops.moe import choose_experts

pytestmark = pytest.mark.skipif(CUDA, reason="these kernels are for an NPU; on CUDA the definition computes")
KERNELS = triton_kernels()
HALF = torch.float16  # the interpreter cuts off digits on the way to bfloat16
#: experts, chosen, groups that take part, groups
SIZES = [
    (1, 1, 1, 1),
    (2, 2, 1, 1),
    (7, 3, 1, 1),
    (128, 8, 1, 1),
    (160, 6, 3, 8),
    (256, 8, 4, 8),
    (12, 5, 1, 4),
    (6, 6, 2, 3),
]


def from_scores(scores: Tensor, x: Tensor, k: int, **given: Any) -> tuple[Tensor, Tensor]:
    """Weights and experts that `ops.moe_gate` promises for these scores."""
    by = scores if given["bias"] is None else scores + given["bias"].float()
    experts = choose_experts(by, k, given["k_group"], given["groups"], given["two_of_group"])
    weights = scores.gather(-1, experts)
    if given["renorm"]:
        total = sum(weights[..., i : i + 1] for i in range(k))
        weights = weights / (total + given["eps"])
    return (weights * given["scale"]).to(x.dtype), experts.int()


def rows(experts: int, dtype: torch.dtype) -> Tensor:
    """Plain rows; equal experts; zeros of both signs; infinities; NaN."""
    x = draw(9, experts, dtype=dtype)
    x[1] = 0.0
    x[2] = (x[2] * 2).round() / 2
    x[3, ::2] = -0.0
    x[3, 1::2] = 0.0
    x[4, experts // 2] = math.nan
    x[5, experts // 3 :] = -math.inf
    x[6, -1] = math.inf
    x[7] = -math.inf
    return x


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NPU's in the interpreter."""
    monkeypatch.setattr(launch, "HOST", "npu")


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("experts", "k", "k_group", "groups"), SIZES)
def test_the_gate_is_as_it_is_defined(experts: int, k: int, k_group: int, groups: int, sigmoid: bool) -> None:
    bias = draw(experts, seed=1, scale=0.1)
    bias[0], bias[experts // 2] = -math.inf, -0.0
    ways: list[dict[str, Any]] = [
        {"bias": None, "two_of_group": False, "renorm": False, "scale": 1.0},
        {"bias": bias, "two_of_group": experts > groups, "renorm": True, "scale": 2.5},
    ]
    for way, dtype in zip(ways, (HALF, torch.float32), strict=True):
        x = rows(experts, dtype)
        given = {"k_group": k_group, "groups": groups, "sigmoid": sigmoid, "eps": 1e-20} | way
        scores, weights, chosen = KERNELS["moe_gate"](x, k, **given)
        if sigmoid:
            exact = x.double().sigmoid()
            error = (scores.double() - exact).abs() / exact.clamp_min(2.0**-126)
            assert error.nan_to_num().max() < 2.0**-22 and torch.equal(scores.isnan(), x.isnan())
        else:
            assert same(scores, KERNELS["softmax"](x, -1, dtype=torch.float32))
        wanted_weights, wanted = from_scores(scores, x, k, **given)
        assert torch.equal(chosen, wanted)
        assert same(weights.nan_to_num(-1), wanted_weights.nan_to_num(-1))
        assert torch.equal(weights.isnan(), wanted_weights.isnan())
        for i, m in ((0, 1), (8, 9)):  # alone, and among others
            alone = KERNELS["moe_gate"](x[i : i + 1].repeat(m, 1)[m - 1 :], k, **given)
            assert same(
                tuple(t.nan_to_num(-1) for t in alone),
                tuple(t[i : i + 1].nan_to_num(-1) for t in (scores, weights, chosen)),
            )


def test_a_gate_of_rows_that_lie_apart_and_of_none() -> None:
    x = draw(6, 64)
    wide = torch.full((6, 70), math.nan, device=DEVICE)
    wide[:, 3:67] = x
    assert same(KERNELS["moe_gate"](wide[:, 3:67], 4), KERNELS["moe_gate"](x, 4))
    assert same(
        KERNELS["moe_gate"](x.t().contiguous().t().view(2, 3, 64), 4),
        tuple(t.view(2, 3, -1) for t in KERNELS["moe_gate"](x, 4)),
    )
    assert [t.shape for t in KERNELS["moe_gate"](x[:0], 4)] == [(0, 64), (0, 4), (0, 4)]
    for wrong in ({"k": 0}, {"k": 65}, {"k": 2, "groups": 7}, {"k": 2, "k_group": 3, "groups": 2}):
        with pytest.raises(RuntimeError, match="bi_compile::moe_gate cannot take"):
            KERNELS["moe_gate"](x, **wrong)
    with pytest.raises(RuntimeError, match="no two largest"):
        KERNELS["moe_gate"](x, 1, groups=64, two_of_group=True)
    with pytest.raises(NotImplementedError, match="moe_gate: a program holds a row of up to"):
        KERNELS["moe_gate"](draw(1, 5000), 4)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("tokens", "k", "width"), [(1, 1, 1), (1, 8, 64), (5, 3, 65), (17, 6, 1500), (3, 0, 16)])
def test_the_sum_over_experts_is_in_their_order(tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    x, weights = draw(tokens * k + 2, width, dtype=dtype), draw(tokens, k, dtype=HALF, seed=1)
    x[0] = -0.0
    at = torch.randperm(tokens * k + 2, generator=torch.Generator().manual_seed(0))[: tokens * k].to(DEVICE)
    total = torch.zeros(tokens, width, device=DEVICE)
    for i in range(k):
        # one rounding, but for a rare second one in float32
        product = x[at.view(tokens, k)[:, i]].double() * weights[:, i : i + 1].double()
        total = (product + total.double()).float()
    found = KERNELS["moe_combine"](x, at.int(), weights)
    assert same(found, total.to(dtype))
    wide = torch.full((x.shape[0], width + 3), math.nan, dtype=dtype, device=DEVICE)
    wide[:, 1 : width + 1] = x
    assert same(KERNELS["moe_combine"](wide[:, 1 : width + 1], -at, weights), found)
    if tokens > 1:
        assert same(KERNELS["moe_combine"](x, at[-k:].int() if k else at.int(), weights[-1:]), found[-1:])
