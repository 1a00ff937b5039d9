"""Triton's interpreter in the place of an NPU's cores. Import it before any kernel, with TRITON_INTERPRET=1.

The interpreter leaves `tl.dot` to a BLAS, whose order follows the tile, and reads bfloat16 as integers. The cube adds the
products of a block up for each element by itself. Here they are added in ascending K, in float64, and rounded once for
each block: what the cube's own order costs in digits is not seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _wide(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return handle.data.astype(np.float64)


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    left, right = _wide(a), _wide(b)
    total = d.data.astype(np.float64)
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def install() -> None:
    """For the rest of this process."""
    np.seterr(all="ignore")
    interpreter.InterpreterBuilder.create_dot = _dot
