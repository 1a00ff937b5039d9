"""The kernels in Triton, for CUDA. They run on a CPU's tensors in Triton's interpreter (`TRITON_INTERPRET=1`).

The order of each sum stands in the docstring of the kernel that takes it; what may follow the number of rows, in `tiles`. Each function here has its operator's arguments, checks them as the operator's fake implementation does, and
fills the empty outputs that it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise RuntimeError(
        "bi_compile's kernels for CUDA are written in Triton, which cannot be imported here: install it with "
        "`pip install triton`, in the version that your PyTorch requires"
    ) from error

from . import attention, matmul, norm, paged_attention, reduce

DISPATCH_KEY = "CUDA"
#: operator -> the function that computes it
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    **matmul.IMPLEMENTATIONS,
    **reduce.IMPLEMENTATIONS,
    **norm.IMPLEMENTATIONS,
    **attention.IMPLEMENTATIONS,
    **paged_attention.IMPLEMENTATIONS,
}


def register(library: torch.library.Library) -> None:
    """Give every operator its kernel for CUDA."""
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, DISPATCH_KEY)
