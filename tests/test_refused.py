"""What the eager fallback refuses: operators that vary and have no replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import python, rand

from bi_compile import AuditError, Options, invariant

SQUARE = rand(3, 6, 6)
OTHER = rand(4, 5, 6)
WITHOUT: dict[str, Callable[[], Any]] = {
    "det": lambda: torch.det(SQUARE),
    "slogdet": lambda: torch.linalg.slogdet(SQUARE),
    "inv": lambda: torch.inverse(SQUARE),
    "solve": lambda: torch.linalg.solve(SQUARE, OTHER[:3, 0, :, None]),
    "svd": lambda: torch.linalg.svd(SQUARE),
    "matrix_exp": lambda: torch.matrix_exp(SQUARE),
    "stft": lambda: torch.stft(rand(3, 64), 16, return_complex=True),
    "fft": lambda: torch.fft.fft(SQUARE),
    "irfft": lambda: torch.fft.irfft(SQUARE.to(torch.complex64)),
    "prod": lambda: SQUARE.prod(-1),
    "cumprod": lambda: SQUARE.cumprod(-1),
    "cdist": lambda: torch.cdist(rand(30, 6), rand(30, 6, seed=1)),
    "index_add": lambda: torch.zeros(2, 6).index_add(0, torch.tensor([0, 0, 1, 1, 1, 0]), SQUARE[0]),
    "index_add in place": lambda: torch.zeros(2, 6).index_add_(0, torch.tensor([0, 0, 1, 1, 1, 0]), SQUARE[0]),
    "scatter_add": lambda: torch.zeros(6, 6).scatter_add(0, torch.zeros(6, 6, dtype=torch.int64), SQUARE[0]),
    "sparse product (CSR)": lambda: SQUARE[0].to_sparse_csr() @ SQUARE[1],
    "sparse product (COO)": lambda: SQUARE[0].to_sparse() @ SQUARE[1],
    "dynamic quantization": lambda: torch.quantize_per_tensor_dynamic(SQUARE, torch.qint8, False),
    "embedding_bag": lambda: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), SQUARE[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_an_operator_that_varies_without_a_replacement_is_refused_by_name(name: str) -> None:
    with (
        invariant(),
        pytest.raises(AuditError, match=r"is not batch-invariant and has no replacement: .*test_refused.py, line \d+"),
    ):
        WITHOUT[name]()


def test_the_gradient_of_an_lstm_is_refused() -> None:
    with invariant(), pytest.raises(NotImplementedError, match=r"mkldnn_rnn_layer with gradients"):
        torch.nn.LSTM(6, 4)(SQUARE)


def test_what_is_trusted_or_exact_or_a_gradient_runs() -> None:
    weight = SQUARE.clone().requires_grad_()
    with invariant(Options(trust={"aten::cumprod": "one row"})):
        weight.cumprod(-1).sum().backward()
    with invariant():
        assert torch.arange(1, 5).prod() == 24
        x = OTHER.clone().requires_grad_()
        x[:, [0, 0, 1]].sum().backward()  # adds up where indices meet
        assert x.grad is not None and weight.grad is not None
    weight.cumprod(-1)


def test_it_is_said_once_with_warn() -> None:
    with (
        invariant(Options(on_unproven="warn")),
        pytest.warns(UserWarning, match=r"aten.cumprod.default is not") as said,
    ):
        for _ in range(3):
            SQUARE.cumprod(-1)
    assert len([w for w in said if "cumprod" in str(w.message)]) == 1


REDUCE = """
import os, sys, torch, torch.distributed as dist, bi_compile
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
x = torch.ones(4)
with bi_compile.invariant():
    dist.all_reduce(torch.ones(4, dtype=torch.int64))
    for f in (lambda: dist.all_reduce(x), lambda: dist.reduce(x, 0), lambda: dist.reduce_scatter_tensor(x.clone(), x)):
        try:
            f()
        except bi_compile.AuditError as error:
            print(error)
dist.all_reduce(x)
dist.destroy_process_group()
"""


def test_a_reduction_over_ranks_is_refused(tmp_path: Any) -> None:
    said = python(REDUCE, str(tmp_path / "store")).splitlines()
    assert [line.split()[0] for line in said] == [
        "c10d.allreduce_.default", "c10d.reduce_.default", "c10d._reduce_scatter_base_.default",
    ]  # fmt: skip
    assert all("torch.distributed._functional_collectives" in line for line in said)
