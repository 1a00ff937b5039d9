"""Every pointwise operator of ATen, measured: a row alone and among others, at every width and place, eager and compiled.

    python -m bi_compile.measure.pointwise native|eager|compiled [dtype …]

prints a table with the first place where each operator's row differs, those that never do left out, and exits with 1 if there
is any: as PyTorch runs it, under the eager fallback, or as Inductor compiles it with the passes. The last takes a C++
compiler some 6 minutes of one core for each dtype.

An operator is called with fixed numbers (`NUMBERS`) on operands whose values stand in for what rows hold: normal numbers,
numbers between 0 and 1, large ones, zeros of both signs, subnormals, infinities and NaN. The last are neighbours on purpose:
vector code of some functions takes another way for a whole vector where one of its lanes is large.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ..table import find_operator

_A = torch.ops.aten
WIDTHS = tuple(range(1, 41))
BATCHES = (1, 2, 3, 7, 16, 17, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: wide enough for several threads to share a row
WIDE = 70_000
#: pointwise, or on two halves of a row, though PyTorch does not tag them so
UNTAGGED = ("glu.default", "log_sigmoid_forward.default", "hardswish.default", "floor_divide.default")
#: what no float operand has, or what does not compute
_PASSED_OVER = "bitwise_ shift__ __xor__ clone conj_physical gcd lcm ldexp native_dropout_backward positive rrelu where.self masked_fill".split()
#: argument -> its number, where it is not 1.5
NUMBERS: dict[str, Any] = {
    "n": 3, "p": 2, "decimals": 1, "approximate": "tanh", "rounding_mode": "floor", "lambd": 0.5, "min": -0.5, "max": 0.5,
    "min_val": -0.5, "max_val": 0.5, "threshold": 0.1, "eps": 1e-3, "negative_slope": 0.1, "nan": 0.0, "beta": 0.7,
    "dim": -1, "scale": 1.1, "input_scale": 0.9,
}  # fmt: skip
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """An operator with its numbers filled in."""

    op: OpOverload
    tensors: int
    """How many operands of one size it takes."""

    @property
    def name(self) -> str:
        return str(self.op)

    def __call__(self, *tensors: Tensor) -> Any:
        args, kwargs = self.arguments(tensors)
        return self.op(*args, **kwargs)

    def widened(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Operands whose result has their width: glu halves it."""
        if self.name != "aten.glu.default":
            return list(tensors)
        (x,) = tensors
        return [_like(torch.cat([x, x.flip(1)], 1), x)]

    def arguments(self, tensors: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, the operands in their places."""
        given, args, kwargs = iter(tensors), [], {}
        for a in self.op._schema.arguments:
            is_tensor = "Tensor" in str(a.type)
            value = next(given) if is_tensor else NUMBERS.get(a.name, 1.5)
            if a.kwarg_only:
                kwargs[a.name] = value
            else:
                args.append(value)
        return tuple(args), kwargs


def operators() -> list[Pointwise]:
    """Every functional overload that PyTorch tags pointwise and that takes floats, and `UNTAGGED`."""
    found = []
    for registered in sorted(
        torch._C._dispatch_get_all_op_names()
    ):  # dir(torch.ops.aten) has only what was used before
        op = find_operator(registered.replace("::", ".") + ("" if "." in registered else ".default"))
        if op is None or op.namespace != "aten":
            continue
        name, schema = str(op).removeprefix("aten."), op._schema
        tagged = torch.Tag.pointwise in op.tags or name in UNTAGGED
        tensors = sum("Tensor" in str(a.type) for a in schema.arguments)
        returns = all("Tensor" in str(r.type) for r in schema.returns)  # not aten.equal
        if tagged and tensors and returns and not schema.is_mutable and not any(p in name for p in _PASSED_OVER):
            found.append(Pointwise(op, tensors))
    return found


def values(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, width] of the numbers that the module's text names; of integers from -9 to 9 but 0; two of them for a complex one."""
    if dtype.is_complex:
        part = torch.float64 if dtype == torch.complex128 else torch.float32
        return torch.complex(values(rows, width, part, seed), values(rows, width, part, seed + 1_000_000))
    if not dtype.is_floating_point:
        numbers = torch.randint(-9, 10, (rows, width), generator=torch.Generator().manual_seed(seed)).to(dtype)
        return numbers + (numbers == 0).to(dtype)  # no zero: integers are divided by it, which is an error
    g = torch.Generator().manual_seed(seed)
    shape = (rows, width)
    normal, unit = (
        torch.randn(shape, generator=g, dtype=torch.float64),
        torch.rand(shape, generator=g, dtype=torch.float64),
    )
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -3e4, 1e-40, 1e-6, 40.0, 126.5, 0.5])
    odd = special[torch.randint(len(special), shape, generator=g)].double()
    kind = torch.randint(16, shape, generator=g)
    x = torch.where(kind < 7, 2 * normal, torch.where(kind < 12, unit, torch.where(kind < 14, 100 * normal, odd)))
    return x.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, the sign of zero included; any NaN is equal to any NaN."""
    if a.is_complex():
        return same_bits(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    if a.dtype not in _BITS:
        return torch.equal(a, b)
    differ = a.contiguous().view(_BITS[a.dtype]) != b.contiguous().view(_BITS[b.dtype])
    return not bool((differ & ~(a.isnan() & b.isnan())).any())


def _outputs(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if x.numel()]


def _like(x: Tensor, other: Tensor) -> Tensor:
    """`x` in memory as `other` lies: contiguous, transposed or a slice of columns."""
    if other.is_contiguous():
        return x
    return next(y for name, y in _layouts(x) if (name == "transposed") == (other.stride(0) == 1))


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, differently in memory."""
    yield "contiguous", x
    yield "transposed", x.t().contiguous().t()
    wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
    wide[:, 2:-1] = x
    yield "a slice of columns", wide[:, 2:-1]


def _batches(n: int, width: int, dtype: torch.dtype, sizes: Sequence[int]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Batch size, place of the row that is looked at, operands; the same row in each, and other neighbours."""
    row = [values(1, width, dtype, 1 + i) for i in range(n)]
    for size in sizes:
        for at in sorted({0, size // 2, size - 1}):
            operands = [values(size, width, dtype, 100 * size + 10 * at + i) for i in range(n)]
            for x, r in zip(operands, row, strict=True):
                x[at] = r[0]
            yield size, at, operands


def eager(
    p: Pointwise,
    dtype: torch.dtype,
    widths: Sequence[int] = (*WIDTHS, WIDE),
    batches: Sequence[int] = BATCHES,
    device: str = "cpu",
) -> str | None:
    """The first place where a row's bits are not those of the row alone, or None. Called operator by operator."""
    for width in widths:
        want: list[Tensor] | None = None
        for size, at, operands in _batches(p.tensors, width, dtype, batches if width < WIDE else (1, 3)):
            for layout, given in _in_layouts(operands):
                try:
                    got = [y[at].cpu() for y in _outputs(p(*(x.to(device) for x in p.widened(given))))]
                except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                    if want is None:  # the first call: it does not take this dtype
                        return f"refused: {str(error).splitlines()[0]}"
                    raise
                want = got if want is None else want
                if not all(same_bits(a, b) for a, b in zip(got, want, strict=True)):
                    return f"{width} wide, row {at} of {size}, {layout}"
    return None


def _in_layouts(operands: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    for each in zip(*(_layouts(x) for x in operands), strict=True):
        yield each[0][0], [x for _, x in each]


# -- compiled ---------------------------------------------------------------------------------------------------------


def in_one_graph(points: Sequence[Pointwise]) -> fx.GraphModule:
    """A graph that calls each on operands of its own, so that none is fused with another."""
    graph = fx.Graph()
    outs = []
    for i, p in enumerate(points):
        args, kwargs = p.arguments([graph.placeholder(f"x{i}_{k}") for k in range(p.tensors)])
        if p.name in ("aten.add.Scalar", "aten.sub.Scalar"):
            args = args[:2]  # Inductor takes no alpha there
        outs.append(graph.call_function(p.op, args, kwargs))
    graph.output(tuple(outs))
    return fx.GraphModule({}, graph)


def refused(p: Pointwise, dtype: torch.dtype) -> str | None:
    """Why PyTorch or the decompositions of its compiler do not take the operator with this dtype, or None."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    operands = [values(2, 6, dtype, i) for i in range(p.tensors)]
    gm = in_one_graph([p])
    try:
        p(*operands)
        make_fx(lambda *xs: gm(*xs), decomposition_table=select_decomp_table(), tracing_mode="fake")(*operands)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
    return None


def compiled(
    points: Sequence[Pointwise],
    dtype: torch.dtype,
    widths: Sequence[int] = WIDTHS,
    batches: Sequence[int] = BATCHES,
    dynamic: bool = True,
    device: str = "cpu",
) -> dict[str, str | None]:
    """Operator -> the first place where a row's bits are not those of the row alone, or None; by torch.compile with bi_ascend.

    All in one graph, each in a loop of its own. With symbolic sizes there is one graph for the row alone, and one for each
    layout of several rows (as slices of columns two dimensions do not become one loop); width 1 has graphs of its own.
    Those that are `refused` are told so.
    """
    found: dict[str, str | None] = {p.name: f"refused: {why}" if (why := refused(p, dtype)) else None for p in points}
    some = [p for p in points if found[p.name] is None]
    gm = in_one_graph(some)
    for width in widths if some else ():
        if width == widths[0] or not dynamic:
            torch._dynamo.reset()
            run = torch.compile(gm, backend="bi_ascend", dynamic=dynamic, fullgraph=True)
        want: list[Any] = []
        for size, at, layout, operands in everywhere(some, width, dtype, batches):
            results = run(*(x.to(device) for x in operands))
            got = [[y[at].cpu() for y in _outputs(result)] for result in results]
            want = want or got
            for p, a, b in zip(some, got, want, strict=True):
                if found[p.name] is None and not all(map(same_bits, a, b)):
                    found[p.name] = f"{width} wide, row {at} of {size}, {layout}"
    return found


def everywhere(
    points: Sequence[Pointwise], width: int, dtype: torch.dtype, sizes: Sequence[int]
) -> Iterator[tuple[int, int, str, list[Tensor]]]:
    """Batch size, place of the row, layout, the operands of all of `points`; the row alone comes first."""
    most = max(p.tensors for p in points)
    for size, at, operands in _batches(most, width, dtype, sizes):
        for layout, given in _in_layouts(operands):
            if layout != "contiguous" and (size == 1 or width == 1):
                continue
            if layout != "transposed":
                yield size, at, layout, [_copy(x) for p in points for x in p.widened(given[: p.tensors])]


def _copy(x: Tensor) -> Tensor:
    """Memory of its own, and the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def main(way: str, names: Sequence[str]) -> bool:
    """Print the table of one way; whether no row differs."""
    from .. import invariant

    points = operators()
    with torch.no_grad(), warnings.catch_warnings(), invariant() if way == "eager" else nullcontext():
        warnings.simplefilter("ignore")
        columns: dict[str, dict[str, str | None]] = {}
        for name in names:
            dtype = getattr(torch, name)
            columns[name] = compiled(points, dtype) if way == "compiled" else {p.name: eager(p, dtype) for p in points}
            said = [where for where in columns[name].values() if where]
            silent = [where for where in said if not where.startswith("refused")]
            print(
                f"{way}, {name}: {len(points)} operators, {len(said) - len(silent)} refused, {len(silent)} differ",
                flush=True,
            )
    print(f"| operator | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for p in points:
        if any(columns[name][p.name] for name in names):
            print(f"| `{p.name}` | {' | '.join(columns[name][p.name] or '' for name in names)} |")
    return not any(
        where and not where.startswith("refused") for column in columns.values() for where in column.values()
    )


if __name__ == "__main__":
    ways, dtypes = sys.argv[1:2], sys.argv[2:] or [str(d).removeprefix("torch.") for d in DTYPES]
    if ways not in (["native"], ["eager"], ["compiled"]):
        sys.exit("python -m bi_compile.measure.pointwise native|eager|compiled [dtype …]")
    sys.exit(0 if main(ways[0], dtypes) else 1)
