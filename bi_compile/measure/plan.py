"""A plan: batches as data. What a batch holds, how it lies in memory and how it runs; nothing here calls the function."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64)
#: what may stand in a place instead of a row, for floating-point inputs
FILLS = {
    "zero": lambda dtype: 0.0,
    "huge": lambda dtype: torch.finfo(dtype).max / 16,
    "nan": lambda dtype: float("nan"),
    "inf": lambda dtype: float("inf"),
}
#: how a batch may lie in memory
LAYOUTS = ("contiguous", "offset", "pitched", "transposed")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of the function.

    Attributes:
        rows: for each place the row of the inputs that stands there; a row may stand in several.
        kind: what the plan varies with this batch.
        fills: (place, name in `FILLS`): these places hold that value in every floating-point input, and are not compared.
        layout: "contiguous"; "offset": from the second element of its memory; "pitched": rows further apart than they are
            long; "transposed": the first dimension is the innermost in memory.
        threads: torch.set_num_threads; None: as it is.
        process: whether it runs in a second process.
        dynamic: torch.compile's argument, where the plan compiles.
    """

    rows: tuple[int, ...]
    kind: str = "alone"
    fills: tuple[tuple[int, str], ...] = ()
    layout: str = "contiguous"
    threads: int | None = None
    process: bool = False
    dynamic: bool | None = None

    def compared(self) -> Iterator[tuple[int, int]]:
        """(place, row) of each place that holds a row of the inputs."""
        filled = {place for place, _ in self.fills}
        return ((place, row) for place, row in enumerate(self.rows) if place not in filled)

    def __str__(self) -> str:
        said = [f"{len(self.rows)} rows"]
        for name in dict.fromkeys(fill for _, fill in self.fills):
            said.append(f"{sum(fill == name for _, fill in self.fills)} of them {name}")
        said += [self.layout] if self.layout != "contiguous" else []
        said += [f"{self.threads} threads"] if self.threads is not None else []
        said += ["in a second process"] if self.process else []
        said += [f"dynamic={self.dynamic}"] if self.dynamic is not None else []
        return ", ".join(said)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Batches in the order in which they run."""

    batches: tuple[Batch, ...]
    seed: int


def batch_from(data: dict[str, Any]) -> Batch:
    """A batch as `dataclasses.asdict` and JSON hold it."""
    return Batch(**{**data, "rows": tuple(data["rows"]), "fills": tuple((p, f) for p, f in data["fills"])})


def make_plan(
    rows: int,
    seed: int = 0,
    sizes: Sequence[int] = SIZES,
    *,
    floating: bool = True,
    threads: Sequence[int] = (),
    process: bool = False,
    graphs: bool = False,
) -> Plan:
    """Batches of `sizes` over `rows` rows (which repeat where a batch is larger), varied one thing at a time.

    Args:
        floating: whether an input can hold huge numbers, NaN and inf.
        threads: thread counts to try.
        process: whether a second process can run the function.
        graphs: whether the function is compiled here, so that static and dynamic graphs are tried.
    """
    rng = random.Random(seed)

    def first(n: int) -> tuple[int, ...]:
        return tuple(i % rows for i in range(n))

    few = [n for n in sizes if n in (2, 17, 33)] or list(sizes[-1:])
    batches = [Batch(first(n), "size") for n in sizes]
    batches += [
        Batch((*first(n)[1:][:at], 0, *first(n)[1:][at:]), "position")
        for n in few
        for at in dict.fromkeys((1, n // 2, n - 1))
    ]
    for n in sizes:
        if n > 1:
            batches += [Batch(first(n)[::-1], "order"), Batch(tuple(rng.sample(first(n), n)), "order")]
    if floating:
        for n in [n for n in sizes if n > 1]:
            for fill in ("huge", "nan", "inf"):
                at = rng.randrange(n)
                fills = tuple((place, fill) for place in range(n) if place != at)
                batches.append(Batch(first(n), "neighbours", fills))
            up_to = 16 * (n // 16 + 1)
            batches.append(Batch(first(up_to), "padding", tuple((place, "zero") for place in range(n, up_to))))
    batches += [Batch(first(n), "memory", layout=layout) for n in (1, *few) for layout in LAYOUTS[1:]]
    batches += [Batch(first(n), "threads", threads=t) for t in threads for n in (1, *few)]
    if process:
        batches += [Batch(first(n), "process", process=True) for n in (1, *few)]
    if graphs:
        batches += [Batch(first(n), "graph", dynamic=dynamic) for dynamic in (False, True) for n in (1, *few)]
    return Plan(tuple(dict.fromkeys(batches)), seed)


def build(inputs: Sequence[Any], dims: Sequence[int | None], batch: Batch) -> list[Any]:
    """The inputs of one call, in memory of their own; those without a batch dimension as they are."""
    return [x if dim is None else _built(x, dim, batch) for x, dim in zip(inputs, dims, strict=True)]


def _built(x: Tensor, dim: int, batch: Batch) -> Tensor:
    y = x.detach().index_select(dim, torch.tensor(batch.rows, dtype=torch.long, device=x.device))
    if x.is_floating_point():
        for place, fill in batch.fills:
            y.select(dim, place).fill_(FILLS[fill](x.dtype))
    return _laid_out(y, batch.layout)


def _laid_out(y: Tensor, layout: str) -> Tensor:
    if layout == "offset":
        return torch.empty(y.numel() + 1, dtype=y.dtype, device=y.device)[1:].view(y.shape).copy_(y)
    if layout == "pitched" and y.dim():
        return torch.empty(*y.shape[:-1], y.shape[-1] + 3, dtype=y.dtype, device=y.device)[..., : y.shape[-1]].copy_(y)
    if layout == "transposed" and y.dim() > 1:
        return y.transpose(0, -1).contiguous().transpose(0, -1)
    return y.contiguous()
