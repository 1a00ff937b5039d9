"""Pointwise functions whose native CPU kernel computes an element differently by its place in memory.

PyTorch's CPU kernels compute most of a tensor with vector code and the rest of a loop with scalar code, and for some
functions the two round differently. Where the rest lies follows the number of elements, their strides and how many
threads share the work: so silu(x) of one row changes with the rows around it. Which functions, `passes/pointwise.py`
says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Pointwise
from .declare import check, composite, operator

#: operator -> how it is called with (tensors, numbers, word)
CALLS: dict[str, Callable[[Any, Sequence[Tensor], Sequence[float], str | None], Tensor]] = {
    **dict.fromkeys(
        (
            f"aten.{name}.default"
            for name in "atanh cosh exp2 mish rsqrt sigmoid silu sinh softplus elu logit atan2 logaddexp hypot".split()
        ),
        lambda op, tensors, numbers, word: op(*tensors, *numbers),
    ),
    "aten.pow.Tensor_Scalar": lambda op, tensors, numbers, word: op(*tensors, *numbers),
    "aten.pow.Tensor_Tensor": lambda op, tensors, numbers, word: op(*tensors),
    "aten.gelu.default": lambda op, tensors, numbers, word: op(*tensors, approximate=word),
    "aten.pow.Scalar": lambda op, tensors, numbers, word: op(*numbers, *tensors),
    "aten.add.Tensor": lambda op, tensors, numbers, word: op(*tensors, alpha=numbers[0]),
    "aten.sub.Tensor": lambda op, tensors, numbers, word: op(*tensors, alpha=numbers[0]),
}
#: elements a call: below PyTorch's grain of 32768, from which on threads share the work, and a multiple of every vector
CHUNK = 32768 - 64


def _call(name: str, tensors: Sequence[Tensor], numbers: Sequence[float], word: str | None) -> Tensor:
    check(name in CALLS, lambda: f"bi_compile::pointwise does not know {name!r}: it knows {', '.join(CALLS)}")
    _, packet, overload = name.split(".")
    return CALLS[name](getattr(getattr(torch.ops.aten, packet), overload), tensors, numbers, word)


@operator("pointwise(str name, Tensor[] tensors, float[] numbers=[], str? word=None) -> Tensor", batch=Pointwise())
def pointwise(name: str, tensors: Sequence[Tensor], numbers: Sequence[float] = (), word: str | None = None) -> Tensor:
    """The aten operator `name` of `CALLS` on tensors that are broadcast together; result contiguous.

    Every element takes the native kernel's vector code: the elements are laid out one behind the other and filled up to
    whole vectors. No sum is involved.
    """
    return _call(name, torch.broadcast_tensors(*tensors), numbers, word).contiguous()


@composite("pointwise")
def _in_whole_vectors(
    name: str, tensors: Sequence[Tensor], numbers: Sequence[float] = (), word: str | None = None
) -> Tensor:
    together = torch.broadcast_tensors(*tensors)
    shape, n = together[0].shape, together[0].numel()
    flat = [torch.nn.functional.pad(t.reshape(-1), (0, -n % 64), value=1) for t in together]
    parts = [_call(name, [t[i : i + CHUNK] for t in flat], numbers, word) for i in range(0, max(n, 1), CHUNK)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole[:n].reshape(shape).contiguous()
