"""The adversarial device varies where it may and nowhere else; a rewritten model keeps its rows on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import pipeline, rand, same_bits
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from bi_compile import AuditError, ops
from bi_compile.measure.adversarial import HELD, ORDERED, Adversary, moved
from bi_compile.measure.models import make
from bi_compile.table import find_operator

X, W = rand(7, 50), rand(50, 30, seed=1)
SOME = slice(2, 5)


def varies(f: Callable[[Tensor], Tensor], **how: Any) -> bool:
    with Adversary(**how):
        return not same_bits(f(X)[SOME], f(X[SOME]))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x @ W,
        lambda x: torch.addmm(W[0], x, W, beta=0.5),
        lambda x: x.sum(-1),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.bfloat16() @ W.bfloat16(),
        lambda x: x.softmax(-1),
        lambda x: torch.fft.rfft(x),
        lambda x: torch.sum(x, 1, out=x.new_empty(x.shape[0])),
        lambda x: x.clone().cumsum_(1),
        lambda x: torch.sigmoid(x),
        lambda x: x.double() @ W.double(),
    ],
)
def test_what_is_not_proven_varies_a_little(f: Callable[[Tensor], Tensor]) -> None:
    assert varies(f)
    with Adversary():
        found = f(X)
    torch.testing.assert_close(found, f(X), rtol=2e-2, atol=2e-2)
    with Adversary():  # the same seed, the same bits
        assert same_bits(f(X), found)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: ops.mm(x, W),
        lambda x: ops.softmax(x, -1),
        lambda x: x.relu() * 2 + W.t()[0, :50],
        lambda x: ops.amax(x, [-1], False),
        lambda x: x.long().sum(-1),
        lambda x: x.t()[:20].t().flip(-1),
    ],
)
def test_what_is_proven_runs_as_it_is(f: Callable[[Tensor], Tensor]) -> None:
    assert not varies(f)
    with Adversary() as device:
        assert same_bits(f(X), f(X))
    assert not device.perturbed


def test_ordered_operators_exist_and_are_right() -> None:
    assert all(find_operator(name) is not None for name in ORDERED if not name.startswith("npu."))
    x, w = X.double(), W.double()
    for f in (lambda: x @ w, lambda: x.sum((0, 1)), lambda: x.mean(0, True), lambda: x.sum(), lambda: x[0] @ x[1]):
        with Adversary():
            found = f()
        torch.testing.assert_close(found, f(), rtol=1e-12, atol=1e-12)


def test_the_dial_and_the_seed() -> None:
    with Adversary(share=0.0) as device:
        honest = X @ W
    assert torch.equal(honest, X @ W) and not device.perturbed
    with Adversary(0):
        a = X @ W
    with Adversary(1):
        b = X @ W
    assert not torch.equal(a, b)


def test_trust_is_no_proof_unless_it_is_given() -> None:
    with Adversary(trust={"aten::mm": "a wager"}) as device:
        believed = X @ W
    assert torch.equal(believed, X @ W) and not device.perturbed


def test_moved_keeps_what_has_no_neighbour() -> None:
    x = torch.tensor([0.0, float("inf"), float("nan"), float("-inf")]).repeat(20)
    assert same_bits(moved(x, 3), x)
    y = moved(X.bfloat16(), 3)
    assert 0 < (y != X.bfloat16()).sum() < X.numel() and (y.float() - X).abs().max() < 0.1


def test_graphs_within_graphs_run() -> None:
    """Each with an operator in it that the device perturbs."""
    f = {
        "cond": lambda x: torch.ops.higher_order.cond(W.amax() > 0, lambda y: y @ W, lambda y: y @ W * 2, (x,)),
        "invoke_subgraph": lambda x: HELD["invoke_subgraph"](lambda y: y @ W, "name", x),
        "while_loop": lambda x: HELD["while_loop"](lambda i, y: i < 2, lambda i, y: (i + 1, y @ (W @ W.t())), (torch.tensor(0), x))[1],
        "map_impl": lambda x: HELD["map_impl"](lambda row: [row @ W], [x])[0],
        "scan": lambda x: HELD["scan"](lambda c, row: [c + row, row @ x], [x.new_zeros(x.shape[0])], [x.t()])[1].t(),
    }  # fmt: skip
    for run in f.values():
        with Adversary() as device:
            found = run(X)
        with torch.no_grad():
            assert device.perturbed and torch.allclose(found, run(X), rtol=1e-3, atol=1e-3)
    with Adversary(), pytest.raises(AuditError, match="cannot run associative_scan: it knows cond"):
        torch.ops.higher_order.associative_scan(lambda a, b: a + b, [X], ())


@pytest.fixture
def npu() -> Iterator[None]:
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        yield
        return
    library = torch.library.Library("npu", "FRAGMENT")
    library.define("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)")
    yield
    library._destroy()


def test_operators_without_a_kernel_are_computed_by_their_references(npu: None) -> None:
    """Of torch_npu's operators only the schema is here."""

    def norm(x: Tensor) -> Tensor:
        return torch.ops.npu.npu_rms_norm(x, W[:, 0].contiguous())[0]

    assert varies(norm)
    with Adversary(share=0.0):
        want = X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + 1e-6) * W[:, 0]
        torch.testing.assert_close(norm(X), want)


def qwen3(rows: int, folder: Path) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The logits of the token that follows 11 others, from a Qwen3 of two layers with random weights; and ids for it."""
    from transformers import AutoModelForCausalLM

    where = make("qwen3", folder / "qwen3-2", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()

    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    return logits, torch.randint(10, 4000, (rows, 11), generator=torch.Generator().manual_seed(0))


def test_qwen3_keeps_its_rows_only_when_rewritten(tmp_path: Path) -> None:
    """Two layers, as AOTAutograd captures them, the batch symbolic, and its passes' result."""
    logits, ids = qwen3(5, tmp_path)
    graphs: list[fx.GraphModule] = []
    calls: list[list[Any]] = []

    def grab(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)

        def run(*args: Any) -> Any:
            calls.append(list(args))
            return gm(*args)

        return make_boxed_func(run)

    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(ids, 0)
    compiled = torch.compile(logits, backend=aot_autograd(fw_compiler=grab, inference_compiler=grab))
    with torch.no_grad():
        compiled(ids)
        compiled(ids[SOME])
    (before,) = graphs
    after = copy.deepcopy(before)
    done = pipeline(inner="eager")
    done.rewrite(after.graph, "captured")
    after.recompile()
    assert not done.audit(after.graph).objections
    for gm, equal in ((before, False), (after, True)):
        with torch.no_grad(), Adversary() as device:
            together, alone = (gm(*args)[0] for args in calls)
        assert same_bits(together[SOME], alone) is equal and bool(device.perturbed) is not equal, device.perturbed
