"""Every operator on a CPU: what the fakes promise, what is refused by name, one OpenMP runtime."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from cpu_cases import each_dtype, outputs, rand
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bi_compile import ops


def examples(dtype: torch.dtype) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    x, w, m = rand(3, 5, 8, dtype=dtype), rand(8, dtype=dtype), rand(8, 8, dtype=dtype)
    q = rand(2, 4, 3, 8, dtype=dtype).transpose(1, 2)
    narrow: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "moe_gate": ((x.transpose(0, 1), 3), {"renorm": True}),
        "moe_combine": ((m, torch.arange(-3, 3), m[:2, :3]), {}),
        "qk_norm": ((m, w[:2].contiguous(), w[2:4].contiguous(), 2, 1, 1e-6), {}),
        "latent_key": (
            (
                m,
                w[:6].contiguous(),
                m[:, :2],
                m[:, :2],
                torch.arange(-1, 7),
                rand(2, 4, 2, dtype=dtype),
                rand(2, 4, 6, dtype=dtype),
                1e-6,
            ),
            {},
        ),
        "moe_experts": (
            (
                m,
                rand(2, 8, 8, dtype=dtype),
                rand(2, 8, 4, dtype=dtype),
                torch.arange(8).unsqueeze(1) % 2,
                m[:, :1],
                "silu",
            ),
            {},
        ),
    }
    if dtype == torch.float64:
        narrow = {}
    if dtype in (torch.float32, torch.float64):
        narrow["tanh"] = ((x.transpose(0, 1),), {})
    return {
        "mm": ((m, m.t()), {}),
        "mm_segments": ((m, m.t(), 4), {}),
        "addmm": ((w, m, m), {"beta": 2, "alpha": 3}),
        "bmm": ((x, x.transpose(1, 2)), {}),
        "bmm_transposed": ((x, x.transpose(1, 2)), {}),
        "baddbmm": ((rand(1, dtype=dtype)[:, None, None], x, x.transpose(1, 2)), {}),
        "sum": ((x.transpose(0, 1), [0, -1], True), {"dtype": torch.float32}),
        "mean": ((x.transpose(0, 1), []), {}),
        "var_mean": ((x.transpose(0, 1), [1], 0), {}),
        "logsumexp": ((x.transpose(0, 1), [1]), {}),
        "softmax": ((x.transpose(0, 1), 1), {"dtype": torch.float64}),
        "log_softmax": ((x.transpose(0, 2), -1), {}),
        "cumsum": ((x.transpose(0, 1), 0), {}),
        "rms_norm": ((x.transpose(0, 1), w, 1e-6), {}),
        "add_rms_norm": ((x.transpose(0, 1), x.transpose(0, 1), w, 1e-6), {}),
        "layer_norm": ((x.transpose(0, 1), w, w, 1e-6), {}),
        "group_norm": ((rand(2, 8, 3, dtype=dtype).to(memory_format=torch.contiguous_format), w, w, 2, 1e-6), {}),
        "scaled_dot_product_attention": ((q, q, q), {"is_causal": True}),
        "sequence_attention": ((q, q, q), {"left": 1}),
        "sequence_attention_backward": (
            (q, q, q, q, q, q[..., 0].to(torch.float64 if dtype == torch.float64 else torch.float32)),
            {},
        ),
    } | narrow


@each_dtype
def test_outputs_are_what_the_fakes_say(dtype: torch.dtype) -> None:
    for name, (args, kwargs) in examples(dtype).items():
        real = outputs(ops.OPERATORS[name](*args, **kwargs))
        with FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fakes = outputs(ops.OPERATORS[name](*fake_args, **kwargs))
        for r, f in zip(real, fakes, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), name


def test_schemas() -> None:
    for name, (args, kwargs) in examples(torch.float32).items():
        torch.library.opcheck(ops.OPERATORS[name], args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_has_a_kernel() -> None:
    ops.load_kernels("cpu")
    assert set(examples(torch.float32)) <= set(ops.OPERATORS)
    for name in ops.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bi_compile::{name}", "CPU"), name


def test_another_dtype_is_refused_by_name() -> None:
    for name, (args, kwargs) in examples(torch.float32).items():
        for other in (torch.int64, torch.complex64, torch.bool):
            changed = [a.to(other) if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
            with pytest.raises(RuntimeError, match=f"bi_compile::{name} has no kernel"):
                ops.OPERATORS[name](*changed, **kwargs)
    with pytest.raises(RuntimeError, match="bi_compile::sum has no kernel"):
        ops.sum(torch.ones(3), [0], dtype=torch.int32)


W4, X34 = torch.ones(4), torch.ones(3, 4)
CACHES = [torch.ones(2, 4, 2)] * 2

REFUSED: list[tuple[str, tuple[Any, ...]]] = [
    ("mm", (X34, X34)),
    ("mm", (X34, X34.t().double())),
    ("mm", (X34, W4)),
    ("mm_segments", (X34, X34.t(), 3)),
    ("mm_segments", (X34, X34.t(), 8)),
    ("mm_segments", (X34, X34.t(), 0)),
    ("all_reduce_tree", (W4.bfloat16(), "group")),
    ("addmm", (W4.double(), X34, X34.t())),
    ("addmm", (W4, X34, X34.t())),
    ("bmm", (X34, X34)),
    ("bmm", (X34[None], X34.t()[None].expand(2, -1, -1))),
    ("baddbmm", (torch.ones(2, 3, 3), X34[None], X34.t()[None])),
    ("rms_norm", (X34, torch.ones(3), 1e-6)),
    ("rms_norm", (torch.tensor(1.0), None, 1e-6)),
    ("rms_norm", (X34, torch.ones(4, dtype=torch.int32), 1e-6)),
    ("add_rms_norm", (X34, X34.double(), None, 1e-6)),
    ("add_rms_norm", (X34, torch.ones(4), None, 1e-6)),
    ("qk_norm", (X34, torch.ones(2), torch.ones(2), 2, 1, 1e-6)),
    ("qk_norm", (X34, torch.ones(2), torch.ones(2).double(), 1, 1, 1e-6)),
    ("qk_norm", (X34[None], torch.ones(2), torch.ones(2), 1, 1, 1e-6)),
    ("layer_norm", (X34, None, torch.ones(3), 1e-6)),
    ("group_norm", (X34, None, None, 3, 1e-6)),
    ("group_norm", (X34, torch.ones(3), None, 2, 1e-6)),
    ("bmm_transposed", (X34[None], X34.t()[None].double())),
    ("latent_key", (X34, torch.ones(2), X34[:, :1], X34[:, :1], torch.arange(3), *CACHES, 1e-6)),
    ("latent_key", (X34, torch.ones(2), X34[:, :2], X34[:, :2], torch.arange(2), *CACHES, 1e-6)),
    ("latent_key", (X34, torch.ones(2), X34[:, :2], X34[:, :2], torch.arange(3), CACHES[0].half(), CACHES[1], 1e-6)),
    ("latent_key", (X34, torch.ones(2), X34[:, :2], X34[:, :2], torch.arange(3), CACHES[0], CACHES[1][:1], 1e-6)),
    ("moe_gate", (X34, 5)),
    ("moe_combine", (X34, torch.arange(4), torch.ones(2, 3))),
    ("moe_combine", (X34, torch.ones(6), torch.ones(2, 3))),
    ("scaled_dot_product_attention", (X34, X34, X34)),
    ("scaled_dot_product_attention", (X34[None, None], X34[None, None], X34[None, None].double())),
    ("scaled_dot_product_attention", (torch.ones(1, 3, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8))),
    ("scaled_dot_product_attention", (torch.ones(1, 2, 2, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 2, 8))),
    ("scaled_dot_product_attention", (*[torch.ones(1, 2, 3, 8)] * 3, torch.ones(3, 2))),
    ("scaled_dot_product_attention", (*[torch.ones(1, 2, 3, 8)] * 3, torch.ones(3, 3, dtype=torch.int64))),
]


@pytest.mark.parametrize(("name", "args"), REFUSED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(REFUSED)])
def test_what_does_not_fit_is_refused_by_name(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError, match=f"bi_compile::{name}"):
        ops.OPERATORS[name](*args)


@pytest.mark.parametrize("name", ["sum", "mean", "logsumexp", "var_mean"])
def test_wrong_dimensions_are_refused_by_name(name: str) -> None:
    run = ops.OPERATORS[name]
    with pytest.raises(IndexError, match=f"bi_compile::{name}"):
        run(X34, [2])
    with pytest.raises(RuntimeError, match=f"bi_compile::{name}.*twice"):
        run(X34, [1, -1])


def test_one_openmp_runtime() -> None:
    """That of torch; in a process of its own, since other packages bring theirs."""
    code = "from bi_compile import ops; ops.load_kernels('cpu'); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(set(re.findall(r"/\S*lib(?:g|i)?omp\S*", maps))) == 1, maps
