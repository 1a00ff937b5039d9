"""Mixtures of experts on vLLM's CPU engine: its experts, its routers, and an engine. The rest: `mixtures.py`."""

from pathlib import Path

import mixtures
import pytest
import torch
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from bi_compile import ops
from bi_compile.audit.spec import Call, Knowledge, Verdict, judge
from bi_compile.passes import PASSES
from bi_compile.table import Table
from bi_compile.targets import get_target
from bi_compile.vllm.experts import wrong_routing

pytestmark = pytest.mark.xdist_group("second engine")
T, E, K, H = 70, 5, 3, 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "swigluoai"])
def test_a_row_of_vllms_experts_is_the_same_in_every_batch(act: str, dtype: torch.dtype) -> None:
    """The operator in whose place `ops.moe_experts` stands: what it computes; one row is NaN, an expert has no row, one is met twice."""
    torch.manual_seed(0)
    x = torch.randn(T, H).to(dtype)
    x[9], x[11, :5] = torch.nan, -0.0
    experts = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)]).int()  # nobody has the last
    experts[5] = 2
    weights, inner, biased = torch.rand(T, K), 64, act == "swigluoai"
    w13, w2 = (torch.randn(E, *s).mul(0.1).to(dtype) for s in ((2 * inner, H), (H, inner)))
    biases = [torch.randn(E, n).to(dtype) if biased else None for n in (2 * inner, H)]

    def run(rows: slice) -> torch.Tensor:
        return ops.moe_experts(x[rows], w13, w2, experts[rows], weights[rows], act, *biases)

    theirs = torch.empty_like(x)
    packed = [_custom_ops.cpu_prepack_moe_weight(w, "vec") for w in (w13, w2)]
    _custom_ops.cpu_fused_moe(theirs, x, *packed, *biases, weights.clone(), experts, act, "vec")
    together = run(slice(None))
    far = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(together, theirs, rtol=far, atol=far, equal_nan=True)
    for size in (1, 2, 33):
        for start in range(0, T, 7 if size == 1 else T - size):
            rows = slice(start, start + size)
            assert torch.equal(run(rows).view(torch.uint8), together[rows].view(torch.uint8)), (size, start)


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"top_k": 8}, None),
        ({"top_k": 9}, "a token is to have 9 of 8 experts"),
        ({"top_k": 0}, "a token is to have 0 of 8 experts"),
        ({"top_k": 4, "num_expert_group": 4, "topk_group": 2}, None),
        ({"top_k": 2, "num_expert_group": 16, "topk_group": 2}, "8 experts are to stand in 16 groups of one size"),
        ({"top_k": 2, "num_expert_group": 3, "topk_group": 2}, "8 experts are to stand in 3 groups of one size"),
        ({"top_k": 2, "num_expert_group": 4, "topk_group": 5}, "5 of 4 groups are to be chosen"),
        (
            {"top_k": 3, "num_expert_group": 4, "topk_group": 1},
            "1 groups have 2 experts, of which a token is to have 3",
        ),
    ],
)
def test_a_router_that_is_to_choose_what_is_not_there(asked: dict[str, int], wrong: str | None) -> None:
    router = CPURouter(global_num_experts=8, use_grouped_topk="num_expert_group" in asked, **asked)
    assert wrong_routing(router) == wrong


def test_quantised_experts_are_not_known() -> None:
    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        pytest.skip("vLLM has fused_experts_cpu on processors with AVX-512 alone")
    target = get_target("cpu")
    known = Knowledge(target, Table(PASSES, target.name), Table(PASSES, target.name), {})
    assert judge(Call(torch.ops._C.fused_experts_cpu.default, (), {}, complete=False), known)[0] is Verdict.UNPROVEN


def test_a_mixture_on_two_ranks(tmp_path: Path) -> None:
    """GLM-4's, which is DeepSeek-V3's with ordinary attention: sigmoid, groups, a correcting bias, a shared expert."""
    result, said = mixtures.run("glm4-moe", "bfloat16", "two ranks", tmp_path, requests=8, batches=[8], tokens=4)
    assert mixtures.differing(result) == {"8": 0}, result
    (line,) = (text for text in said.splitlines() if "TP0" in text and " bi_compile: " in text)
    replaced = line.partition("replaced ")[2].partition("; left none")[0]
    assert "_C.cpu_fused_moe.default" in replaced, line
    # without AVX-512 vLLM's ranks add up through gloo
    assert any(f"{name}.default" in replaced for name in ("_C.shm_allreduce", "_c10d_functional.all_reduce")), line


def test_a_mixture_on_two_ranks_that_nothing_compiles(tmp_path: Path) -> None:
    result, said = mixtures.run(
        "qwen3-moe", "bfloat16", "two ranks, eager", tmp_path, requests=8, batches=[8], tokens=4
    )
    assert mixtures.differing(result) == {"8": 0}, said[-3000:]
