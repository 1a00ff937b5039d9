"""What the tests of the Triton kernels share: inputs, calls of every operator, and comparisons.

The operators are called on CUDA; where there is none, their functions on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from bi_compile import ops
from bi_compile.kernels.triton import IMPLEMENTATIONS

CUDA = torch.cuda.is_available()

DEVICE = "cuda" if CUDA else "cpu"

cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")

HALVES = (torch.bfloat16, torch.float16)

FLOATS = (torch.float32, *HALVES, torch.float64)

#: the interpreter cuts off digits on the way to bfloat16 where a GPU rounds
ROUNDED = FLOATS if CUDA else (torch.float32, torch.float16, torch.float64)

Outputs = tuple[Tensor, ...]


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """The operator `name` on CUDA, the function that would compute it in the interpreter."""
    return (getattr(ops, name) if CUDA else IMPLEMENTATIONS[name])(*args, **kwargs)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers of several magnitudes: sums of them round differently in almost every order."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.exp(torch.randn(shape, generator=generator, dtype=torch.float64)) * scale).to(dtype).to(DEVICE)


def outputs(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def same(a: Tensor | Outputs, b: Tensor | Outputs) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return all(
        x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in zip(outputs(a), outputs(b), strict=True)
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def statistic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def weight(x: Tensor, seed: int) -> Tensor:
    return parameter(x, x.shape[-1], seed=seed)


def matrix(x: Tensor, columns: int = 40) -> Tensor:
    return parameter(x, columns, x.shape[-1], seed=3).t()


def parameter(x: Tensor, *shape: int, seed: int) -> Tensor:
    """Numbers of bfloat16, so that they are the same in each dtype."""
    return draw(*shape, dtype=torch.bfloat16, seed=seed).to(x.dtype)


#: operator -> a call whose outputs all have x's rows as dimension 0
ROW_CALLS: dict[str, Callable[[Tensor], Tensor | Outputs]] = {
    "mm": lambda x: call("mm", x, matrix(x)),
    "addmm": lambda x: call("addmm", draw(40, dtype=x.dtype)[None], x, matrix(x), beta=0.3, alpha=1.7),
    "bmm": lambda x: call("bmm", x.expand(3, *x.shape), matrix(x).expand(3, -1, -1)).transpose(0, 1),
    "baddbmm": lambda x: call(
        "baddbmm", draw(1, 1, 40, dtype=x.dtype), x[None], matrix(x)[None], beta=0.3, alpha=1.7
    ).transpose(0, 1),
    "sum": lambda x: call("sum", x, [1]),
    "mean": lambda x: call("mean", x, [-1], True),
    "var_mean": lambda x: call("var_mean", x, [1]),
    "logsumexp": lambda x: call("logsumexp", x, [1]),
    "softmax": lambda x: call("softmax", x, 1),
    "log_softmax": lambda x: call("log_softmax", x, -1),
    "cumsum": lambda x: call("cumsum", x, 1),
    "rms_norm": lambda x: call("rms_norm", x, weight(x, 1), 1e-6),
    "add_rms_norm": lambda x: call("add_rms_norm", x, x.flip(1), weight(x, 1), 1e-6),
    "layer_norm": lambda x: call("layer_norm", x, weight(x, 1), weight(x, 2), 1e-5),
    "group_norm": lambda x: call("group_norm", x[:, :, None].expand(-1, -1, 2), weight(x, 1), weight(x, 2), 1, 1e-5),
}  # fmt: skip


def running(x: Tensor) -> Tensor:
    """cumsum in the order that the operator promises: PyTorch's is a tree on CUDA and in float64 on a CPU."""
    total = x.new_zeros(x.shape[0], dtype=statistic(x))
    columns = [total := total + column for column in x.unbind(1)]
    return torch.stack(columns, 1).to(x.dtype)


def variance(x: Tensor) -> Tensor:
    """PyTorch's on a CPU is taken in float64, which no NPU has; this is its definition in float32."""
    wide = x.to(statistic(x))
    return ((wide - wide.mean(1, keepdim=True)).square().sum(1) / (x.shape[1] - 1)).to(x.dtype)


def models_rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """As models write it, and vLLM (vllm/ir/ops/layernorm.py): rounded before the weight."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


#: operator -> what PyTorch computes for the same x [R, C]
THEIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: x @ matrix(x),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "var_mean": lambda x: variance(x),
    "logsumexp": lambda x: x.logsumexp(1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "cumsum": lambda x: running(x),
    "rms_norm": lambda x: models_rms_norm(x, weight(x, 1)),
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[1:], weight(x, 1), weight(x, 2), 1e-5),
}


def shapes_like_the_fake(name: str, real: Tensor | Outputs, *args: Any, **kwargs: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = getattr(ops, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
    for r, f in zip(outputs(real), outputs(fake), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def check(name: str, reference: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Of the fake's layout, and about as near to `reference` in float64 as `reference` in the operands' dtype is.

    Few numbers: the room is a unit in the last place of what the sums would be without cancellation.
    """
    ours = call(name, *args, **kwargs)
    shapes_like_the_fake(name, ours, *args, **kwargs)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact, largest = outputs(reference(*wide)), outputs(reference(*map(magnitude, wide)))
    for o, t, e, a in zip(outputs(ours), outputs(reference(*args)), exact, largest, strict=True):
        scale = a.nan_to_num(0, 0, 0).abs().max().item() + root_mean_square(e) if e.numel() else 0.0
        unit = torch.finfo(o.dtype).eps * {torch.float32: 1, torch.float64: 32}.get(o.dtype, 0.25)
        no_worse(o, t.reshape(o.shape), e.reshape(o.shape), unit * scale)


def magnitude(a: Any) -> Any:
    return a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a


def root_mean_square(x: Tensor) -> float:
    return x.double().where(x.isfinite(), 0).square().mean().sqrt().item()


def no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, room: float = 0.0) -> None:
    """Root mean square of the error."""
    if exact.numel() == 0:
        return
    finite = exact.isfinite() & theirs.isfinite()
    torch.testing.assert_close(ours.where(~finite, 0), theirs.where(~finite, 0), rtol=0, atol=0, equal_nan=True)
    error, allowed = (root_mean_square((t.double() - exact).where(finite, 0)) for t in (ours, theirs))
    assert error <= 1.1 * allowed + room, (error, allowed, room)
