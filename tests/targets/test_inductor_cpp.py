"""What Inductor generates for a CPU computes a function by one routine, in vector code, scalar code and the end of a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import same_bits
from torch import Tensor

from bi_compile import OptionError, Options, Pipeline
from bi_compile.backend import FinalPass
from bi_compile.measure import pointwise
from bi_compile.targets import get_target

ROWS = 33
Function = Callable[[Tensor], Tensor]

#: functions whose scalar code differs from their vector code; the loops are scalar where the innermost size is below 4,
#: and at the end of a loop where many operators are masks
FUNCTIONS: dict[str, Function] = {
    "softplus": F.softplus,
    "celu": F.celu,
    "tanh under a mask": lambda x: x.tanh().masked_fill(x > 1, 0),
    "exp under where": lambda x: torch.where(x > 0, x.exp(), x),
    "sigmoid of two columns": lambda x: torch.sigmoid(x[:, :2]),
    "exp of three columns": lambda x: torch.exp(x[:, :3]),
    "one column times three": lambda x: x[:, :1].tanh() * torch.arange(1, 4),
    "lgamma of three columns": lambda x: torch.lgamma(x[:, :3].abs()),
    "remainder of three columns": lambda x: torch.remainder(x[:, :3], 0.3),
    "atan2 of three columns": lambda x: torch.atan2(x[:, :3], x[:, 3:6]),
    "gelu of three columns": lambda x: F.gelu(x[:, :3]),
    "asinh of three columns": lambda x: torch.asinh(x[:, :3]),
    "pow of three columns": lambda x: x[:, :3].abs() ** 1.7,
    "expm1 of three columns": lambda x: torch.expm1(x[:, :3]),
    "the sine beside large numbers": torch.sin,
    "the cosine beside large numbers": torch.cos,
}


def several(xs: list[Tensor]) -> list[Tensor]:
    """Each function of an input of its own, so that none is fused with another."""
    return [f(x) for f, x in zip(FUNCTIONS.values(), xs, strict=True)]


def rows(n: int, at: int, dtype: torch.dtype) -> Tensor:
    """n rows of 35 numbers, one column of them large; at `at` always the same row, without large ones."""
    x = 3 * torch.randn(n, 35, generator=torch.Generator().manual_seed(n))
    x[:, 5] = 4000.0
    x[at] = torch.linspace(-3, 3, 35)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_at_every_place(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(several, backend="bi_ascend")
    want: list[Tensor] | None = None
    for n in (ROWS, 7, 1):  # static, dynamic, and the graph for one row
        for at in sorted({0, n // 2, n - 1}):
            got = [y[at] for y in compiled([rows(n, at, dtype).clone() for _ in FUNCTIONS])]
            want = got if want is None else want
            differ = [name for name, a, b in zip(FUNCTIONS, got, want, strict=True) if not pointwise.same_bits(a, b)]
            assert not differ, f"row {at} of {n}: {differ}"


def test_the_values_are_the_functions() -> None:
    torch._dynamo.reset()
    x = rows(ROWS, 0, torch.float32)
    for name, got, want in zip(
        FUNCTIONS,
        torch.compile(several, backend="bi_ascend")([x] * len(FUNCTIONS)),
        several([x] * len(FUNCTIONS)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, msg=name)


def test_other_graphs_are_left_alone() -> None:
    """A graph that Inductor compiles without us is as it was before we compiled one."""

    def f(x: Tensor) -> Tensor:
        return torch.exp(x[:, :3])

    def code(backend: str) -> list[str]:
        from torch._inductor.utils import run_and_get_code

        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            (program,) = run_and_get_code(torch.compile(f, backend=backend), torch.ones(ROWS, 35))[1]
        return [line for line in program.splitlines() if "tmp" in line]

    before, ours, after = code("inductor"), code("bi_ascend"), code("inductor")
    assert before == after and "std::exp" not in "".join(ours)
    # with AVX2 alone Inductor takes three elements as a short vector
    assert ("std::exp" in "".join(before)) == (torch.backends.cpu.get_cpu_capability() != "AVX2")


def test_the_cache_key_follows_the_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own takes no account of them."""
    target = get_target("cpu")
    final = FinalPass(Pipeline(Options()), target=target)
    before = final.uuid()
    assert before == final.uuid() == FinalPass(Pipeline(Options()), target=target).uuid()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert final.uuid() != before


@pytest.mark.parametrize(
    ("setting", "value", "needed"),
    [
        ("cpu_backend", "halide", '"cpp"'),
        ("cpp.enable_unsafe_math_opt_flag", True, "False"),
        ("cpp.enable_floating_point_contract_flag", "fast", "'off'"),
    ],
)
def test_another_generator_or_rounding_is_refused(setting: str, value: object, needed: str) -> None:
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({setting: value}),
        pytest.raises(Exception, match=f"{setting} is .* set it to {needed}") as error,
    ):
        torch.compile(torch.exp, backend="bi_ascend")(torch.ones(3))
    assert OptionError.__name__ in str(error.value) or isinstance(error.value, OptionError)


def test_the_helpers_tell_signs_of_zero_apart() -> None:
    zero, nan = torch.zeros(1), torch.full((1,), torch.nan)
    for same in (same_bits, pointwise.same_bits):
        assert not same(zero, -zero) and same(zero, zero) and same(nan, -nan)
    assert not same_bits(zero.to(torch.complex64), -zero.to(torch.complex64))
