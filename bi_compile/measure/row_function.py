"""A function with inputs whose rows can be told apart: what it is checked for, and how it is called on a batch.

python -m bi_compile.measure.row_function FOLDER     # the second process: runs FOLDER/batches.pt, writes FOLDER/outputs.pt
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..errors import MeasureError, ProcessError
from .plan import Batch, batch_from, build

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the rows of an output are: `length` elements of dimension `dim` belong to each row."""

    dim: int
    length: int

    def of(self, output: Tensor, place: int) -> Tensor:
        return output.narrow(self.dim, place * self.length, self.length)


class Case:
    """A function, the inputs that it is called with, and the dimension of each that the batch runs along.

    Args:
        fn: the function, or its import path "package.module:name".
        inputs: its positional arguments.
        batch_dims: as `in_dims` of torch.vmap: one dimension for every tensor, or for each input a dimension or None.
        backend: compile the function with this backend of torch.compile; None: call it as it is.

    Raises:
        MeasureError: one sentence that names the input and says what to change.
    """

    def __init__(
        self,
        fn: Function | str,
        inputs: Sequence[Any],
        batch_dims: int | Sequence[int | None] = 0,
        backend: str | None = None,
    ) -> None:
        self.fn = load(fn) if isinstance(fn, str) else fn
        self.path = fn if isinstance(fn, str) else import_path(fn)
        self.inputs = list(inputs)
        self.dims = _dims(self.inputs, batch_dims)
        self.backend = backend
        sizes = {i: self.inputs[i].shape[d] for i, d in enumerate(self.dims) if d is not None}
        if not sizes:
            raise MeasureError(
                "no input has a batch dimension: name it in batch_dims, as in batch_dims=0, or (0, None) for (x, weight)"
            )
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            listed = ", ".join(f"input {i} has {n}" for i, n in sizes.items())
            raise MeasureError(f"the batch dimensions are not of one size, or empty: {listed}; correct batch_dims")
        _no_aliases(self.inputs)
        self.rows = next(iter(sizes.values()))
        self.floating = any(
            d is not None and x.is_floating_point() for x, d in zip(self.inputs, self.dims, strict=True)
        )
        self._compiled: tuple[bool | None, Function] | None = None

    def __call__(self, batch: Batch, around: AbstractContextManager[Any] | None = None) -> list[Tensor]:
        """The tensors that the function returns for `batch`, in the order of their tree; runs here, not in a second process.

        around: entered while the function runs.
        """
        with _threads(batch.threads), torch.no_grad():
            function, given = self._function(batch.dynamic), build(self.inputs, self.dims, batch)
            with around or nullcontext():
                result = function(*given)
            # a copy: a compiled function may write its next result into the same memory
            return [x.detach().clone() for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]

    def _function(self, dynamic: bool | None) -> Function:
        if self.backend is None:
            return self.fn
        if self._compiled is None or self._compiled[0] != dynamic:
            torch._dynamo.reset()  # graphs of one setting would serve the other
            options: Any = {"batch": self._named()} if self.backend == "bi_ascend" and self._named() else None
            self._compiled = dynamic, torch.compile(self.fn, backend=self.backend, dynamic=dynamic, options=options)
        return self._compiled[1]

    def _named(self) -> dict[str, int]:
        """Where the backend's option `batch` has to say what `batch_dims` says: it takes dimension 0 of every input."""
        if all(d == 0 for x, d in zip(self.inputs, self.dims, strict=True) if isinstance(x, Tensor) and x.dim()):
            return {}
        function = self.fn.forward if isinstance(self.fn, torch.nn.Module) else self.fn
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except ValueError:  # a builtin, such as torch.matmul
            raise MeasureError(
                f"the inputs of {self.name} have no names, by which the backend would know their batch dimension: "
                "call it in a Python function of yours, and name that"
            ) from None
        rest = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names += [f"{p.name}[{i}]" for p in rest for i in range(len(self.inputs) - len(names))]
        return {name: d for name, d in zip(names, self.dims, strict=False) if d is not None}

    def places(self) -> list[Place]:
        """Where the rows of each output are: the dimension that grows with the batch.

        Raises:
            MeasureError: an output has none, or more than one.
        """
        two, three = (self(Batch(tuple(i % self.rows for i in range(n)))) for n in (2, 3))
        if not two or len(two) != len(three):
            raise MeasureError(f"{self.name} returns no tensor, or not always as many: return the tensors to compare")
        return [self._place(i, list(a.shape), list(b.shape)) for i, (a, b) in enumerate(zip(two, three, strict=True))]

    def _place(self, i: int, two: list[int], three: list[int]) -> Place:
        grown = [d for d, (a, b) in enumerate(zip(two, three, strict=False)) if a != b]
        if len(two) != len(three) or len(grown) != 1 or 3 * two[grown[0]] != 2 * three[grown[0]]:
            raise MeasureError(
                f"output {i} of {self.name} has no batch dimension: it is {two} for 2 rows and {three} for 3, where one "
                "dimension must grow with the rows; return an output with one part for each row, or correct batch_dims"
            )
        return Place(grown[0], two[grown[0]] // 2)

    @property
    def name(self) -> str:
        return self.path or str(getattr(self.fn, "__qualname__", type(self.fn).__qualname__))

    def elsewhere(self, batches: Sequence[Batch]) -> list[list[Tensor]]:
        """The outputs of each batch, run one after another in a second process.

        Raises:
            ProcessError: the process failed; the message holds the end of its output.
        """
        from .process import python

        with tempfile.TemporaryDirectory(prefix="bi_compile_verify_") as folder:
            data = {
                "fn": self.path,
                "inputs": self.inputs,
                "dims": self.dims,
                "backend": self.backend,
                "batches": [dataclasses.asdict(b) for b in batches],
            }
            torch.save(data, Path(folder) / "batches.pt")
            done = python(["-m", __name__, folder], PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
            if done.returncode:
                raise ProcessError(f"the second process failed:\n{done.stdout[-3000:]}")
            found: list[list[Tensor]] = torch.load(Path(folder) / "outputs.pt")
            return found


def load(path: str) -> Any:
    """What "package.module:name" names. Raises MeasureError."""
    try:
        found: Any = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise MeasureError(f"{path!r} cannot be imported ({error}): write it as package.module:name") from error
    if not callable(found):
        raise MeasureError(f"{path!r} is {type(found).__name__}, which cannot be called")
    return found


def import_path(fn: Function) -> str | None:
    """The path under which another process finds `fn`, or None."""
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name:
        return None
    try:
        return f"{module}:{name}" if load(f"{module}:{name}") is fn else None
    except MeasureError:
        return None


def _dims(inputs: Sequence[Any], given: int | Sequence[int | None]) -> list[int | None]:
    if isinstance(given, int):
        given = [given if isinstance(x, Tensor) else None for x in inputs]
    if len(given) != len(inputs):
        raise MeasureError(f"batch_dims has {len(given)} entries for {len(inputs)} inputs: give one for each, or None")
    found: list[int | None] = []
    for i, (x, dim) in enumerate(zip(inputs, given, strict=True)):
        if dim is None:
            found.append(None)
            continue
        if not isinstance(x, Tensor):
            raise MeasureError(f"input {i} is {type(x).__name__}, which has no dimension {dim}: give None for it")
        if not -x.dim() <= dim < x.dim():
            raise MeasureError(f"input {i} is {list(x.shape)}, which has no dimension {dim}: correct batch_dims")
        found.append(dim % x.dim())
    return found


def _no_aliases(inputs: Sequence[Any]) -> None:
    spans = []
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.numel():
            reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
            spans.append((i, x.data_ptr(), x.data_ptr() + reach * x.element_size()))
    for i, start, end in spans:
        for j, other_start, other_end in spans:
            if i < j and start < other_end and other_start < end:
                raise MeasureError(
                    f"the inputs {i} and {j} share memory, and batches are made of copies, which would not: pass a clone of one"
                )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def recompiling() -> Iterator[None]:
    """Every size, layout and thread count may have a graph of its own."""
    limits = {"recompile_limit": 1000, "accumulated_recompile_limit": 10000, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        yield


def _child(folder: Path) -> None:
    data = torch.load(folder / "batches.pt")
    case = Case(data["fn"], data["inputs"], data["dims"], data["backend"])
    with recompiling():
        torch.save([case(batch_from(b)) for b in data["batches"]], folder / "outputs.pt")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
