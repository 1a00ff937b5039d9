"""The operators on an Ascend NPU: AscendC's where its package is installed (`ascendc`), else the kernels of
`bi_compile.kernels.triton`, of mixtures of experts those of `moe` and of latent attention those of `latent`, compiled by triton-ascend.

The tiles are the "npu" entries of `bi_compile.kernels.triton.tiles`. Sums of float64 are refused: neither the cube nor
the vector cores add it up, and Ascend's kernel compiler has no type for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

DISPATCH_KEY = "PrivateUse1"


def _without_float64(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [getattr(x, "dtype", x) for x in (*args, *kwargs.values())]
        if torch.float64 in [x for x in given if isinstance(x, torch.dtype)]:
            raise NotImplementedError(
                f"bi_compile::{name} has no kernel for torch.float64 on an Ascend NPU, whose cores cannot add it up: "
                "cast to float32, or move the tensors to the CPU"
            )
        return function(*args, **kwargs)

    return run


def triton_kernels() -> dict[str, Callable[..., Any]]:
    """operator -> the function that computes it by a Triton kernel."""
    from .. import triton
    from . import latent, moe

    return triton.IMPLEMENTATIONS | latent.IMPLEMENTATIONS | moe.IMPLEMENTATIONS


def register(library: torch.library.Library) -> None:
    """Give every operator its kernel for Ascend.

    Raises:
        RuntimeError: Triton cannot be imported.
        HostError: AscendC's package is there and lacks an operator.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "bi_compile's kernels for Ascend are written in Triton, which cannot be imported here: install it with "
            "`pip install triton-ascend`, without upstream's triton beside it"
        ) from error
    from .ascendc import preferred

    kernels = {name: _without_float64(name, function) for name, function in triton_kernels().items()}
    for name, function in preferred(kernels).items():
        library.impl(name, function, DISPATCH_KEY)
