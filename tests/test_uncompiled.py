"""A program that was given to the backend: what torch.compile leaves uncompiled has equal rows, or is refused with its place."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import python, rand, rows_equal
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import bi_compile
from bi_compile import AuditError, HostError, OptionError, eager
from bi_compile.backend import bi_ascend

WIDTH = 256
ROWS = rand(17, 3, WIDTH)
WEIGHT = rand(WIDTH, WIDTH, seed=1)
BATCHES = (2, 3, 5, 17)
FACES: dict[str, Callable[..., Any]] = {
    "bi_compile.compile": lambda f, **kwargs: bi_compile.compile(f, options={"inner": "eager"}, **kwargs),
    "torch.compile": lambda f, **kw: torch.compile(f, backend="bi_ascend", options={"inner": "eager"}, **kw),
}


@pytest.fixture(params=FACES)
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield FACES[request.param]
    assert _get_current_dispatch_mode() is None and eager._active.fallbacks == ()


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).softmax(-1)


class Layer(Body):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 + self.index / 8)


class Disabled(Body):
    @torch._dynamo.disable
    def part(self, x: Tensor) -> Tensor:
        return (x @ WEIGHT).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(super().forward(x))


class Traced(Body):
    def __init__(self) -> None:
        super().__init__()
        self.traced = torch.jit.trace(Body().eval(), ROWS[:2])

    def forward(self, x: Tensor) -> Tensor:
        return self.traced(super().forward(x))


class InATry(Body):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = x @ WEIGHT
            torch._dynamo.graph_break()
            return super().forward(y)
        finally:
            self.calls = getattr(self, "calls", 0) + 1


class Recurrent(Body):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer = kind(WIDTH, WIDTH, batch_first=True)  # as wide as its input: oneDNN's LSTM varies then

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(super().forward(x))[0]


def test_without_the_backend_they_vary() -> None:
    """What all this is for; without it the tests below would say nothing."""
    with torch.no_grad():
        for model in (Body(), Disabled(), Traced(), InATry(), Recurrent(nn.GRU), Recurrent(nn.LSTM)):
            assert not rows_equal(model.eval(), ROWS, BATCHES), type(model)


@pytest.mark.parametrize(
    "model", [Disabled, Traced, InATry, lambda: Recurrent(nn.GRU), lambda: Recurrent(nn.RNN), lambda: Recurrent(nn.LSTM)],
    ids=["disable", "jit.trace", "a break inside try", "GRU", "RNN", "LSTM"],
)  # fmt: skip
def test_rows_are_equal(compiled: Callable[..., Any], model: Callable[[], nn.Module]) -> None:
    assert rows_equal(compiled(model().eval()), ROWS, BATCHES)


def test_layers_compiled_one_by_one(compiled: Callable[..., Any]) -> None:
    """Twelve that read their index, more than the recompile limit: they share their code, not the limit."""
    layers = [compiled(Layer(i).eval()) for i in range(12)]
    assert rows_equal(lambda x: functools.reduce(lambda y, layer: layer(y), layers, x), ROWS, BATCHES)


def test_beyond_the_recompile_limit_is_an_error(compiled: Callable[..., Any]) -> None:
    """Other batches would be compiled, and fused code rounds differently."""
    run = compiled(Body().eval(), dynamic=False)
    with pytest.raises(
        HostError, match=r"limit is reached in forward \(.*test_uncompiled.py, line \d+\).*dynamic=True"
    ):
        for n in range(1, 12):
            run(ROWS[:n])
    with torch._dynamo.config.patch(recompile_limit=20):
        assert rows_equal(run, ROWS, range(2, 14))


def test_hooks_run_under_the_fallback(compiled: Callable[..., Any]) -> None:
    run = compiled(Body().eval())
    run.register_forward_hook(lambda module, args, out: out @ WEIGHT)
    run.register_forward_pre_hook(lambda module, args: (args[0] @ WEIGHT,))
    assert rows_equal(run, ROWS, BATCHES)
    module = nn.Sequential(Body(), Body()).eval()
    module.register_forward_hook(lambda module, args, out: out @ WEIGHT)
    module.compile(backend="bi_ascend", options={"inner": "eager"})
    assert rows_equal(module, ROWS, BATCHES)


def test_within_an_outer_torch_compile(compiled: Callable[..., Any]) -> None:
    """The outer one, with another backend, calls it and does not compile what is in it."""
    for inner in (compiled(Body().eval()), compiled(lambda x: (x @ WEIGHT).softmax(-1))):
        torch._dynamo.reset()
        assert rows_equal(torch.compile(lambda x, f=inner: f(x) + 1, backend="aot_eager"), ROWS, BATCHES)


def test_stances(compiled: Callable[..., Any]) -> None:
    run = compiled(Body().eval())
    run(ROWS[:2])
    with torch.compiler.set_stance("force_eager"):
        assert rows_equal(run, ROWS, BATCHES)
    for stance in ("eager_on_recompile", "eager_then_compile"):
        with (
            torch.compiler.set_stance(stance),
            pytest.raises(HostError, match=f"set_stance.'{stance}'. runs some batches"),
        ):
            run(ROWS)
    with (
        torch.compiler.set_stance(force_backend="eager"),
        pytest.raises(HostError, match="compiles with another backend"),
    ):
        run(ROWS)
    assert rows_equal(run, ROWS, BATCHES)


def test_suppressed_errors_are_an_error(compiled: Callable[..., Any]) -> None:
    run = compiled(Body().eval())
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(HostError, match=r"suppress_errors.*set it to False"),
    ):
        run(ROWS)


def test_an_operator_that_is_not_known(compiled: Callable[..., Any]) -> None:
    """Outside of a graph it is refused as within one."""
    library = torch.library.Library("uncompiled_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x * 2, "CPU")

    @torch._dynamo.disable
    def part(x: Tensor) -> Tensor:
        return torch.ops.uncompiled_test.mystery(x)

    with pytest.raises(AuditError, match=r"uncompiled_test.mystery.default unproven.*test_uncompiled.py"):
        compiled(lambda x: part(x + 1))(ROWS)
    library._destroy()


@pytest.mark.parametrize("setting", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_where_nothing_is_compiled(setting: str) -> None:
    program = """
import torch, bi_compile, sys, warnings
m, x = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.LayerNorm(256)).eval(), torch.randn(17, 3, 256)
for compile in (bi_compile.compile, lambda m: torch.compile(m, backend="bi_ascend")):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        f = compile(m)
    print([str(w.message).split()[1] for w in said if "nothing is compiled" in str(w.message)])
    with torch.no_grad():
        print(torch.equal(m(x)[:1], m(x[:1])), torch.equal(f(x)[:1], f(x[:1])), f.state_dict().keys() == f.state_dict().keys())
"""
    lines = python(program, **{setting: "1"}).splitlines()
    assert [setting in line for line in lines] == [True, False] * 2 and lines[1::2] == ["False True True"] * 2


def test_a_mode_and_a_backend_are_refused() -> None:
    with pytest.raises(OptionError, match="backend='inductor'"):
        bi_compile.compile(Body(), backend="inductor")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="mode='max-autotune'"):
        bi_compile.compile(Body(), mode="max-autotune")(ROWS)


def test_a_backend_within_a_backend_is_refused() -> None:
    torch._dynamo.reset()
    run = torch.compile(Body().eval(), backend=lambda gm, inputs: bi_ascend(gm, inputs, options={"inner": "eager"}))
    with pytest.raises(Exception, match=r"called by another backend.*bi_compile.compile"):
        run(ROWS)
    torch._dynamo.reset()
    partial = functools.partial(bi_ascend, options={"inner": "eager"})
    with torch.no_grad():
        assert rows_equal(torch.compile(Disabled().eval(), backend=partial), ROWS, BATCHES)


def test_it_is_a_decorator_and_keeps_what_torch_compile_gives() -> None:
    @bi_compile.compile(options={"inner": "eager"}, dynamic=True)
    def f(x: Tensor) -> Tensor:
        """Doc."""
        return x.softmax(-1)

    assert f.__name__ == "f" and f.__doc__ == "Doc." and f(ROWS).shape == ROWS.shape
    model = Body()
    run = bi_compile.compile(model, options={"inner": "eager"})
    assert isinstance(run, torch._dynamo.eval_frame.OptimizedModule) and run.linear is model.linear
    run(ROWS).sum().backward()
    assert model.linear.weight.grad is not None


def test_a_graph_costs_nothing_more() -> None:
    """Within a graph no mode is there, and the fallback is not made where nothing needs it."""
    seen = []
    library = torch.library.Library("uncompiled_test", "DEF")
    library.define("look(Tensor x) -> Tensor")
    library.impl("look", lambda x: (seen.append(_get_current_dispatch_mode()), x * 2)[1], "CPU")
    library.impl("look", lambda x: torch.empty_like(x), "Meta")
    options = {"inner": "eager", "trust": {"uncompiled_test::look": "a test"}}
    run = bi_compile.compile(lambda x: torch.ops.uncompiled_test.look(x).softmax(-1), options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ROWS), run(ROWS)
    assert seen == [None, None] and eager._active.fallbacks == ()
    library._destroy()
