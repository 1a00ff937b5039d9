"""Pointwise functions whose native CPU kernel computes an element differently by its place in memory.

PyTorch's CPU kernels compute most of a tensor with vector code and the rest of a loop with scalar code, and for some
functions the two round differently. Where the rest lies follows the number of elements, their strides and how many
threads share the work: so silu(x) of one row changes with the rows around it. Which functions, `passes/pointwise.py`
says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Pointwise
from .declare import check, composite, operator

#: elements a call: a multiple of every vector, and fewer than threads share: from 16,384 on in gelu (GELU_MIN_ELEMENTS_FOR_MULTI_THREADING in
#: aten/src/ATen/native/cpu/Activation.cpp), from 32,768 on elsewhere
CHUNK = 16384 - 64


def _call(name: str, tensors: Sequence[Tensor], numbers: Sequence[float], word: str | None) -> Tensor:
    """The operator with its arguments filled in by their types, each from its list in the order of the schema."""
    ns, packet, overload = name.split(".")
    if name == "aten.glu.default":  # its two halves, one behind the other
        return torch.ops.aten.glu.default(torch.stack(list(tensors)), 0)[0]
    op = getattr(getattr(getattr(torch.ops, ns), packet), overload)
    next_tensor, next_number = iter(tensors), iter(numbers)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for a in op._schema.arguments:
        kind = str(a.type)
        value: Any = next(next_tensor) if "Tensor" in kind else word if "str" in kind else next(next_number, None)
        value = int(value) if kind == "int" else value
        if a.kwarg_only:
            kwargs[a.name] = value
        else:
            args.append(value)
    result: Tensor = op(*args, **kwargs)
    return result


@operator("pointwise(str name, Tensor[] tensors, float[] numbers=[], str? word=None) -> Tensor", batch=Pointwise())
def pointwise(name: str, tensors: Sequence[Tensor], numbers: Sequence[float] = (), word: str | None = None) -> Tensor:
    """The pointwise operator `name` (`ns.packet.overload`) on tensors that are broadcast together; result contiguous.

    Its other arguments come in `numbers` and `word`, in the order of its schema; glu takes its two halves.

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


@operator("tanh(Tensor self) -> Tensor", batch=Pointwise())
def tanh(self: Tensor) -> Tensor:
    """tanh of each element of a float32 or float64 tensor, contiguous. On a CPU by SLEEF on whole vectors, as in Inductor's code, where
    PyTorch's eager code takes MKL's; elsewhere PyTorch's. No sum is involved."""
    check(
        self.dtype in (torch.float32, torch.float64),
        lambda: (
            f"bi_compile::tanh has no kernel for {self.dtype}: use float32 or float64, or torch.tanh, which computes the others so"
        ),
    )
    return self.new_empty(self.shape)


@composite("tanh")
def _tanh(self: Tensor) -> Tensor:
    return torch.tanh(self).contiguous()
