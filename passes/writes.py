"""Writes at indices: where several go to one place, the last of them stays."""

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.ops import write
from bi_compile.table import Pass, refuse

aten = torch.ops.aten
Indices = list[Tensor | None]


class Writes(Pass):
    """index_put, index_copy, put and scatter without a sum; of several writes to one place the last stays."""

    name = "writes"
    why = "threads share out the writes, and which of several to one place comes last follows their number"
    source = (
        "aten/src/ATen/native/cpu/IndexKernel.cpp (cpu_index in parallel unless deterministic), Inductor's scatter loop; "
        "measured: 7 of 7 elements written 70,000 times differ"
    )


def _adds(self: Tensor, indices: Indices, values: Tensor, accumulate: bool = False, unsafe: bool = False) -> bool:
    """A sum, of which the audit says what it is; or masks alone, whose places are distinct."""
    masks = all(i is None or i.dtype in write.MASKS for i in indices)
    return accumulate or masks


def _exact(self: Tensor, indices: Indices, values: Tensor, accumulate: bool = False, unsafe: bool = False) -> bool:
    """Masks alone, or integers that are added up."""
    return (accumulate and not self.is_floating_point()) or (not accumulate and _adds(self, indices, values))


@Writes.replaces(aten.index_put.default, unless=_adds, eager=False)
def index_put(self: Tensor, indices: Indices, values: Tensor, accumulate: bool = False) -> Tensor:
    return ops.index_put(self, indices, values)


@Writes.replaces(aten._unsafe_index_put.default, unless=_adds, eager=False)
def unsafe_index_put(self: Tensor, indices: Indices, values: Tensor, accumulate: bool = False) -> Tensor:
    return ops.index_put(self, indices, values)


@Writes.replaces(aten._index_put_impl_.default, unless=_exact)
def index_put_impl(
    self: Tensor, indices: Indices, values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """What every index_put of eager code calls; in place, so that a cache is not copied."""
    if accumulate:
        write.add_in_order(self, indices, values)
        return self
    found, last = write.with_last_values(self, indices, values)
    return aten._index_put_impl_.default(self, found, last, False, unsafe)


@Writes.replaces(aten.index_copy.default)
def index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return ops.index_copy(self, dim, index, source)


@Writes.replaces(aten.index_copy_.default)
def index_copy_(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return aten.index_copy_.default(self, dim, index, write.with_last_slices(dim, index, source))


def _adds_integers(self: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> bool:
    """Integers are added up."""
    return accumulate and not self.is_floating_point() and not self.is_complex()


@Writes.replaces(aten.put.default, unless=_adds_integers)
def put(self: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    if accumulate:
        refuse(
            "aten.put",
            ["accumulate=True"],
            "flatten the tensor and use index_put, which adds in the order of the indices",
        )
    return ops.index_put(self.reshape(-1), [index.reshape(-1)], source.reshape(-1)).reshape(self.shape)


@Writes.replaces(aten.scatter.src, targets=["cpu", "cuda", "ascend-a2", "ascend-a3", "ascend-950"])
def scatter(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    return ops.scatter(self, dim, index, src)
