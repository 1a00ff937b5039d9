"""torch.compile(backend="bi_ascend"): rows that are equal in every batch, and everything else as PyTorch has it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import close, python, rand, rows_equal, same_bits
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code

import bi_compile
from bi_compile import AuditError, OptionError, Options

WIDTH = 256
BATCHES = (1, 2, 3, 5, 17)
#: with short rows PyTorch's own product takes another kernel for few of them
ROWS = rand(17, 3, WIDTH)


class Model(nn.Module):
    """Normalisation, attention and a feed-forward part; batch first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.norm2 = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, length, WIDTH)
        )
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        return F.log_softmax(x, -1)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model().eval()


def compiled(f: Any, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="bi_ascend", dynamic=dynamic, options=options or None)


def no_grad(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(lambda *args: f(*args))


# -- rows -------------------------------------------------------------------------------------------------------------


def test_torch_compile_alone_varies(model: Model) -> None:
    """What all this is for; without it the tests below would say nothing."""
    assert not rows_equal(no_grad(torch.compile(model, dynamic=True)), ROWS, BATCHES)


@pytest.mark.parametrize("inner", ["inductor", "eager", "aot_eager"])
def test_rows_are_equal_in_every_batch_and_place(model: Model, inner: str) -> None:
    """Dynamic shapes. A batch of one has a graph of its own."""
    f = no_grad(compiled(model, dynamic=True, inner=inner))
    assert rows_equal(f, ROWS, BATCHES)
    with torch.no_grad():
        torch.testing.assert_close(f(ROWS), model(ROWS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_rows_are_equal_across_graphs_of_static_shapes(model: Model, inner: str) -> None:
    batches = (3, 17) if inner == "inductor" else BATCHES
    assert rows_equal(no_grad(compiled(model, dynamic=False, inner=inner)), ROWS, batches)


def test_rows_are_equal_with_a_dimension_marked_dynamic(model: Model) -> None:
    f = compiled(model, inner="eager")

    def marked(x: Tensor) -> Tensor:
        x = x.clone()
        if len(x) > 1:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            return f(x)

    assert rows_equal(marked, ROWS, BATCHES)


def test_static_and_dynamic_graphs_and_inner_compilers_of_one_target_agree(model: Model) -> None:
    """Row 0 has the same bits with a graph for its batch and with one for every batch."""
    one, two = (no_grad(compiled(model, dynamic=d, inner="eager")) for d in (True, False))
    assert same_bits(one(ROWS[:3]), two(ROWS[:3]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38], ids=str)
def test_a_row_does_not_see_its_neighbours(model: Model, bad: float) -> None:
    f = no_grad(compiled(model, dynamic=True))
    alone = f(ROWS[:1])
    for at in (0, 1, 4):
        x = torch.full((5, *ROWS.shape[1:]), bad)
        x[at] = ROWS[0]
        assert same_bits(f(x)[at : at + 1], alone)


# -- PyTorch's behaviour is kept --------------------------------------------------------------------------------------


def test_the_backend_is_found_without_importing_it() -> None:
    program = """
import torch
f = torch.compile(lambda x: x.softmax(-1), backend="bi_ascend", options={"inner": "eager"})
print(f(torch.zeros(2, 4))[0, 0].item(), "bi_ascend" in torch._dynamo.list_backends())
"""
    assert python(program).split() == ["0.25", "True"]


def test_buffers_are_mutated() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(x.softmax(-1)[0])
            self.calls += 1
            return x @ self.seen

    module, reference = Counter(), Counter()
    f = no_grad(compiled(module, inner="aot_eager"))
    for i in range(3):
        close(f(rand(2, 4, seed=i)), reference(rand(2, 4, seed=i)))
    close([module.seen, module.calls], [reference.seen, reference.calls])


def test_a_training_step(tmp_path: Path) -> None:
    """Gradients are those of PyTorch; the backward graph holds no operator of ours."""
    module, reference = Model(), Model()
    seen: list[fx.GraphModule] = []

    @torch._dynamo.register_backend
    def bi_compile_test_recorder(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    f = compiled(module, inner="bi_compile_test_recorder")
    for _m, g in ((module, f), (reference, reference)):
        g(ROWS[:3]).square().mean().backward()
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    forward, backward = ({str(n.target) for n in gm.graph.nodes} for gm in seen)
    assert "bi_compile.addmm.default" in forward and "aten.mm.default" not in forward
    assert not any(t.startswith("bi_compile.") for t in backward) and "aten.mm.default" in backward


def test_a_training_step_under_inductor() -> None:
    module, reference = (
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)),
        nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)),
    )
    reference.load_state_dict(module.state_dict())
    x = rand(5, 64)
    compiled(module)(x).square().mul(x).sum().backward()
    reference(x).square().mul(x).sum().backward()
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_graph_breaks() -> None:
    """Each part is compiled; the rows stay their own."""
    w = rand(600, 40)

    def f(x: Tensor) -> Tensor:
        y = x @ w
        torch._dynamo.graph_break()
        return y.softmax(-1)

    g = no_grad(compiled(f, dynamic=True, inner="eager"))
    assert rows_equal(g, rand(17, 600), BATCHES)
    close(g(rand(3, 600)), f(rand(3, 600)))


def test_the_users_own_final_pass_runs_too() -> None:
    """First, and in the graph that the audit judges."""
    from torch._inductor import config

    ran = []
    with config.patch(post_grad_custom_post_pass=lambda graph: ran.append([str(n.target) for n in graph.nodes])):
        compiled(lambda x: x.softmax(-1) + 1)(rand(3, 64))
    assert len(ran) == 1 and "bi_compile.softmax.default" in ran[0]


def test_what_the_users_final_pass_puts_in_is_replaced() -> None:
    from torch._inductor import config

    def native_again(graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if str(node.target) == "bi_compile.mm.default":
                node.target = torch.ops.aten.mm.default

    with config.patch(post_grad_custom_post_pass=native_again):
        f = no_grad(compiled(lambda x, w: x @ w, dynamic=True))
        w = rand(600, 40)
        assert rows_equal(lambda x: f(x, w), rand(17, 600), (2, 17))


# -- what is not known ------------------------------------------------------------------------------------------------


@pytest.fixture
def mystery() -> Iterator[None]:
    library = torch.library.Library("backend_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x * 2, "CompositeExplicitAutograd")
    yield
    library._destroy()


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_an_unknown_operator_stops_compilation_or_is_warned_of(mystery: None, inner: str) -> None:
    def f(x: Tensor) -> Tensor:
        return torch.ops.backend_test.mystery(x.softmax(-1))

    x = rand(3, 64)
    with pytest.raises(
        Exception, match=r"backend_test.mystery.default\) unproven: nothing is known.*test_backend.py"
    ) as raised:
        compiled(f, inner=inner)(x)
    assert isinstance(raised.value, AuditError) or isinstance(
        getattr(raised.value, "inner_exception", raised.value.__cause__), AuditError
    )
    torch._dynamo.reset()
    for _ in range(2):  # with warm caches too
        with pytest.warns(UserWarning, match=r"not batch-invariant: .*backend_test.mystery.default"):
            close(compiled(f, inner=inner, on_unproven="warn")(x), f(x))
        torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not batch-invariant")
        close(compiled(f, inner=inner, trust={"backend_test::mystery": "it doubles"})(x), f(x))


def test_a_malformed_option_stops_compilation() -> None:
    with pytest.raises(Exception, match="unknown option 'pases'") as raised:
        compiled(lambda x: x + 1, pases=["softmax"])(rand(2))
    assert isinstance(raised.value, OptionError) or isinstance(
        getattr(raised.value, "inner_exception", raised.value.__cause__), OptionError
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_a_graph_that_mixes_rows_is_refused(inner: str, dynamic: bool) -> None:
    """And the sentence says which input's which dimension the rows are."""
    message = r"combines the rows along the batch dimension 0 of \w+ .*, which comes from dimension 0 of the input x"
    with pytest.raises(Exception, match=message):
        compiled(lambda x: x - x.mean(0), dynamic=dynamic, inner=inner)(rand(6, 64))
    f = compiled(lambda x: x - x.mean(0), dynamic=dynamic, inner=inner, batch={"x": 1})
    close(f(rand(6, 64)), rand(6, 64) - rand(6, 64).mean(0))


def test_a_graph_out_of_the_cache_was_judged_with_this_batch() -> None:
    """Where the batch is changes the verdict and not the graph."""
    f = lambda x: x - x.mean(0)
    compiled(f, batch={"x": 1})(rand(6, 64))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="combines the rows along the batch dimension 0"):
        compiled(f)(rand(6, 64))


# -- dumps and caches -------------------------------------------------------------------------------------------------


def test_the_audit_judges_the_graph_that_inductor_lowers(tmp_path: Path) -> None:
    """And it holds no variant operator, after Inductor's own fusions."""
    with torch.no_grad():
        compiled(Model().eval(), dump_dir=str(tmp_path))(ROWS[:4])
    folders = sorted(p.name for p in tmp_path.iterdir())
    assert folders == ["graph_000_captured", "graph_001_final"]
    assert not (tmp_path / folders[0] / "audit.json").exists()
    report = json.loads((tmp_path / folders[1] / "audit.json").read_text())
    operators = [n["operator"] for n in report["nodes"]]
    assert operators.count("bi_compile.rms_norm.default") == operators.count("bi_compile.layer_norm.default") == 1
    assert (
        operators.count("bi_compile.addmm.default") == 4
        and operators.count("bi_compile.scaled_dot_product_attention.default") == 1
    )
    assert set(report["counts"]) == {"row-local", "replaced"}


def test_a_mixture_of_experts_keeps_its_rows() -> None:
    """As transformers writes it: rows sorted by expert, one grouped product, and back."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=512, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, 512, (9, 12))
    run = compiled(lambda x: model(input_ids=x, attention_mask=torch.ones_like(x)).logits, dynamic=True)
    with torch.no_grad():
        together = run(tokens)
        for i in (0, 4, 8):
            assert same_bits(run(tokens[i : i + 1]), together[i : i + 1])
            assert same_bits(run(tokens[[2, i]])[1], together[i])


CACHED = """
import hashlib, json, sys
import torch
torch.manual_seed(0)
m = torch.nn.Sequential(torch.nn.Linear(600, 64), torch.nn.LayerNorm(64)).eval()
x = torch.randn(17, 600)
out = []
for options in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    f = torch.compile(m, backend="bi_ascend", dynamic=False, options=options)
    with torch.no_grad():
        bits = hashlib.sha256(f(x).numpy().tobytes()).hexdigest()
    counts = torch._dynamo.utils.counters["inductor"]
    out.append([bits, counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"]])
print(json.dumps(out))
"""


def test_caches(tmp_path: Path) -> None:
    """A second process takes the graph from Inductor's cache, with the same bits; other options never get it.

    With "warn" there is no cache: what a graph from it holds would not be said again.
    """
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    every: dict[str, Any] = {}
    other, some = {"trust": {"aten::prod": "a reason"}}, {"passes": ["layer_norm"], "on_unproven": "warn"}
    (cold,) = json.loads(python(CACHED, json.dumps([every]), **environ).splitlines()[-1])
    found = json.loads(python(CACHED, json.dumps([every, other, some]), **environ).splitlines()[-1])
    assert [cold[1:], *(counts for _, *counts in found)] == [[0, 1], [1, 0], [0, 1], [0, 0]]
    assert [bits == cold[0] for bits, *_ in found] == [True, True, False]


# -- what does not go together ----------------------------------------------------------------------------------------


def test_the_target_is_of_the_graphs_device() -> None:
    with pytest.raises(
        Exception, match=r"target='cuda' is a target of the device 'cuda', and this graph's tensors lie on cpu"
    ):
        compiled(torch.sin, target="cuda", inner="eager")(rand(4, 2))
    with pytest.raises(OptionError, match="not of the device 'cpu'"), bi_compile.invariant(Options(target="cuda")):
        pass


def test_trust_in_an_operator_that_nobody_registered() -> None:
    with pytest.raises(
        Exception, match=r"trust names 'aten::cumprodd', 'no::such', 'aten::prod.no', which is not registered"
    ):
        trust = dict.fromkeys(
            ("aten::cumprodd", "aten::prod", "no::such", "aten::prod.no", "aten.prod.dim_int", "cond"), "a test"
        )
        compiled(torch.sin, trust=trust, inner="eager")(rand(4, 2))


def test_cpp_wrapper_with_symbolic_sizes_is_refused() -> None:
    from torch._inductor import config

    linear = nn.Linear(64, 32)
    with config.patch(cpp_wrapper=True), torch.no_grad():
        assert rows_equal(compiled(linear, dynamic=False), rand(2, 64), (2,))
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"cpp_wrapper=True .*dynamic=False"):
            compiled(linear, dynamic=True)(rand(17, 64))


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_addbmm(inner: str) -> None:
    """It adds up over its first dimension, which is no batch here."""
    torch._dynamo.reset()
    a, b, bias = rand(5, 17, 600), rand(5, 600, 40, seed=1), rand(17, 40, seed=2)
    f = no_grad(
        compiled(
            lambda x, bias: torch.addbmm(bias, x, b, beta=0.5, alpha=2),
            dynamic=False,
            inner=inner,
            batch={"x": 1, "bias": 0},
        )
    )
    torch.testing.assert_close(f(a, bias), torch.addbmm(bias, a, b, beta=0.5, alpha=2), rtol=1e-3, atol=1e-3)
    assert same_bits(f(a[:, :1], bias[:1]), f(a, bias)[:1])


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_linear_of_a_transposed_batch(inner: str) -> None:
    """A transposed batch of one is contiguous, and PyTorch adds the bias of others apart, rounding once more."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.MultiheadAttention(128, 4, batch_first=True, dtype=torch.bfloat16).eval().requires_grad_(False)
    nn.init.normal_(model.in_proj_bias)
    x = rand(17, 6, 128, dtype=torch.bfloat16)
    f = no_grad(compiled(lambda x: model(x, x, x, need_weights=False)[0], inner=inner))
    assert rows_equal(f, x, (2, 17))


def test_one_hot_of_a_symbolic_batch() -> None:
    """It asserts that every class is below the number of classes: a test over all rows, which is in no result."""
    torch._dynamo.reset()
    f = compiled(lambda i: F.one_hot(i, 10) * 2, dynamic=True, inner="aot_eager")
    for n in (2, 3, 17):
        assert torch.equal(f(torch.arange(n) % 10), F.one_hot(torch.arange(n) % 10, 10) * 2)
    with pytest.raises(Exception, match=r"(?i)class"):
        f(torch.full((3,), 10))


def test_a_token_is_written_into_its_cache_in_place() -> None:
    """Also in the first graph that has our attention: Inductor copied the whole cache there."""

    def step(q: Tensor, cache: Tensor, token: Tensor) -> Tensor:
        cache[:, :, -1] = token * 2
        return torch.nn.functional.scaled_dot_product_attention(q, cache, cache) + 1

    q, cache, token = rand(3, 2, 1, 16), rand(3, 2, 40, 16), rand(3, 2, 16)
    compiled = torch.compile(step, backend="bi_ascend")
    changed = cache.clone()
    got, (code, *_) = run_and_get_code(lambda: compiled(q, changed, token))
    assert "(3, 2, 40, 16)" in code and "empty_strided_cpu((3, 2, 40, 16)" not in code
    close(got, step(q, cache, token))
    assert same_bits(changed, cache)
