"""Triton's interpreter in the place of a device's cores. Import it before any kernel, with TRITON_INTERPRET=1.

The interpreter leaves `tl.dot` to a BLAS, whose order follows the tile, and reads bfloat16 as integers. A matrix unit adds
the products of a block up for each element by itself. Here they are added in ascending K, in float64, and rounded once for
each block: what the unit's own order costs in digits is not seen.

It reduces as NumPy does, or one element after the other. Here the halves of a row are combined, then the halves of that:
so Ascend's library reduces (AscendNPU-IR, bishengir/lib/Template, Vector/Reduction/ReduceARImpl.h: by dichotomy, then in
pairs), and a GPU's threads exchange their sums.
"""

from __future__ import annotations

import functools
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


def _reduce(self: Any, inputs: tuple[Any, ...]) -> Any:
    """The elements along self.axis, a power of two of them, combined by halves."""
    inputs, axis = self.unravel(inputs, self.axis)
    while inputs[0].handle.data.shape[axis] > 1:
        halves = [[self.to_tensor(half, x.dtype) for half in np.split(x.handle.data, 2, axis)] for x in inputs]
        left, right = zip(*halves, strict=True)
        result = self.combine_fn.fn(*left, *right)
        inputs = result if isinstance(result, tuple) else (result,)
    results = tuple(x if self.keep_dims else self.to_tensor(np.squeeze(x.handle.data, axis), x.dtype) for x in inputs)
    return results if len(results) > 1 else results[0]


def install() -> None:
    """For the rest of this process."""
    np.seterr(all="ignore")
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.ReduceOps.apply_impl = _reduce
    if not hasattr(interpreter, "_LangPatchScope"):
        # triton-ascend 3.2 puts its functions into triton.language at every call and leaves them there: half of the time
        interpreter._patch_lang = functools.cache(interpreter._patch_lang)
