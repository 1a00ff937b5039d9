"""The proof that lets cuBLASLt compute a product: its bits are those of the Triton kernel, on this device with this library.

One proof covers a device, dtype, N, K, layout of b and form of the epilogue. For each range of heights it asks cuBLASLt's
heuristic for the algorithms that neither split K nor use a workspace, times them, and compares the fastest with the Triton
kernel at the range's first, middle and last height, every element as bits, on three kinds of data:

- normal: what a model has;
- far: exponents that lie far apart, so that small terms are lost or kept by the order;
- cancelling: every product comes twice, once negated, in random places. The exact sum is zero, so what is left is the
  rounding error of the partial sums, which another order has otherwise.

The fastest algorithm that passes is pinned for the range. Where none does, the Triton kernel stays; for few rows it is timed too, and
computes what it is faster at. Proofs are kept on disk, apart for each device, driver, version of cuBLASLt and Triton and source of the
kernels: what has another one is proven anew.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..triton import matmul
from . import build

log = logging.getLogger("bi_compile")

FORMS = ("a @ b", "a @ b + bias[N]", "a @ b + addend[M, N]")
KINDS = ("normal", "far", "cancelling")
HIGHEST = 8192 + 512
"""The greatest height of a proof; heights above the last range's begin are taken to run the same algorithm."""
ELEMENTS = 2**28
"""Elements of the largest result that a proof computes: ranges whose heights would need more stay with the Triton kernel."""
OFFERED, COMPARED = 8, 3
"""Algorithms that the heuristic is asked for, and of the fastest how many are compared."""
TURNS = 7
"""Times that each is taken; their median counts."""
FEW = 64
"""Up to this height the Triton kernel is timed too."""
TRITON_HOST, CUBLASLT_HOST = 7.0, 10.5
"""Microseconds that a call of either costs the host: an H200's, by `bi-compile bench host`. Outside a graph a product takes no less."""
NOWHERE, OUTSIDE_GRAPHS, EVERYWHERE = range(3)
"""Where the Triton kernel computes what cuBLASLt may compute too: `Triton` in product.cpp."""
MOST = 256
"""Proofs that one process makes: a program whose N or K change all the time gets the Triton kernel after that many."""
OPERATIONS = 10**11
"""Additions and multiplications that are timed at once, at least, of many rows: some 150 us."""
CACHE = 50 * 2**20
"""Bytes of the second-level cache: weights rotate through more than that while they are timed."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a proof is for. by_column: b is the transpose of a contiguous [N, K], as a weight is; form: index into FORMS."""

    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    by_column: bool
    form: int

    def __str__(self) -> str:
        layout = "b by column" if self.by_column else "b by row"
        return f"{FORMS[self.form]}, {str(self.dtype).removeprefix('torch.')}, N={self.n}, K={self.k}, {layout}"

    @property
    def highest(self) -> int:
        return min(HIGHEST, ELEMENTS // self.n)


@dataclasses.dataclass
class Choice:
    """What computes the products of one range of heights."""

    low: int
    high: int | None
    """The last height; None: no end."""
    algorithm: str = ""
    """In hexadecimal; empty: the Triton kernel."""
    what: str = "the Triton kernel"
    us: float = 0.0
    triton_us: float = 0.0
    triton: int = NOWHERE
    refused: list[str] = dataclasses.field(default_factory=list)
    """Algorithms whose bits differ."""


class Library(Protocol):
    """What computes products natively: cuBLASLt, and in the tests of this module a stand-in."""

    def algorithms(self, a: Tensor, b: Tensor, bias: Tensor | None) -> list[Tensor]: ...
    def describe(self, algorithm: Tensor) -> str: ...
    def run(self, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, algorithm: Tensor) -> bool: ...
    def microseconds(self, candidates: Sequence[Sequence[Callable[[], object]]]) -> list[float]: ...


class CuBlasLt:
    """cuBLASLt by the C++ operators of `product.cpp`."""

    def algorithms(self, a: Tensor, b: Tensor, bias: Tensor | None) -> list[Tensor]:
        return list(torch.ops.bi_compile_cuda.algorithms(a, b, bias, 0, OFFERED))

    def describe(self, algorithm: Tensor) -> str:
        number, tile, stages, parts, scheme, cluster = torch.ops.bi_compile_cuda.describe(algorithm)
        return f"cuBLASLt's algorithm {number}, tile {tile}, stages {stages}, cluster {cluster}, K in {max(parts, 1)} part(s), reduction scheme {scheme}"

    def run(self, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, algorithm: Tensor) -> bool:
        return bool(torch.ops.bi_compile_cuda.run_algorithm(out, a, b, bias, algorithm, None))

    def microseconds(self, candidates: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
        """The median time of one call of each candidate, from CUDA graphs that hold its calls and take turns: the clock of a device under
        load falls, so what is timed first would look faster than it is."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graphs = []
        with torch.cuda.stream(stream):
            for calls in candidates:
                calls[0]()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                for call in calls:
                    call()
                graph.capture_end()
                graph.replay()
                graphs.append(graph)
            turns = [[torch.cuda.Event(enable_timing=True) for _ in range(len(graphs) + 1)] for _ in range(TURNS)]
            for events in turns:
                events[0].record()
                for graph, event in zip(graphs, events[1:], strict=True):
                    graph.replay()
                    event.record()
        stream.synchronize()
        return [
            statistics.median(events[i].elapsed_time(events[i + 1]) for events in turns) * 1e3 / len(calls)
            for i, calls in enumerate(candidates)
        ]


def reference(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """The Triton kernel."""
    matmul.matrix(out, a, b, bias)


# ---- data ----


def _padded(rows: int, length: int, draw: Callable[[int, int], Tensor]) -> Tensor:
    """[rows, length], rows a multiple of 16 bytes apart."""
    return draw(rows, -(-length // 8) * 8)[:, :length]


def operands(problem: Problem, kind: str, m: int, copies: int = 1) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """a [m, K], `copies` of b [K, N] and the bias or addend, of one kind of data; the same at every call."""
    device, dtype = problem.device, problem.dtype
    random = torch.Generator(device).manual_seed(len(kind) + problem.form)
    # half has a narrow range: results must neither overflow nor, where they are rounding errors, be subnormal
    small = 0.05 if dtype == torch.float16 and kind != "cancelling" else 1.0

    def draw(rows: int, cols: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(rows, cols, device=device, generator=random).mul_(scale)
        if kind == "far":
            x.mul_(torch.exp2(torch.randint(-9, 4 if small < 1 else 10, x.shape, device=device, generator=random)))
        return x.to(dtype)

    k, n = problem.k, problem.n
    a = _padded(m, k, lambda r, c: draw(r, c, 64.0 if kind == "cancelling" else 1.0))
    weight = _padded(n, k, lambda r, c: draw(r, c, small))
    if kind == "cancelling":
        half = k // 2
        places = torch.randperm(k, device=device, generator=random)
        first, second = places[:half], places[half : 2 * half]
        a[:, second] = -a[:, first]
        weight[:, second] = weight[:, first]
        a[:, places[2 * half :]] = 0
    if problem.by_column:
        bs = [weight.t() if i == 0 else _padded(n, k, lambda r, c: draw(r, c, small)).t() for i in range(copies)]
    else:
        transposed = weight.t()
        bs = [
            _padded(k, n, lambda r, c: torch.empty(r, c, dtype=dtype, device=device)).copy_(transposed)
            for _ in range(copies)
        ]
    if problem.form == 0:
        return a, bs, None
    # no larger than the rounding errors, which it would hide
    scale = 64 * k**0.5 * 2.0**-24 if kind == "cancelling" else 1.0
    bias = draw(1, n, scale)[0] if problem.form == 1 else _padded(m, n, lambda r, c: draw(r, c, scale))
    return a, bs, bias


def _rows(bias: Tensor | None, m: int) -> Tensor | None:
    return bias if bias is None or bias.dim() == 1 else bias[:m]


# ---- the proof ----


def ranges(heights: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """First and last height of each range."""
    yield from zip((1, *(h + 1 for h in heights)), (*heights, None), strict=True)


def compared_heights(low: int, high: int | None, highest: int) -> list[int]:
    """First, middle and last height of a range, none above `highest`; empty where the range begins above it."""
    last = min(highest, highest if high is None else high)
    return sorted({low, (low + last) // 2, last}) if low <= last else []


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def prove(problem: Problem, heights: Sequence[int], library: Library) -> list[Choice]:
    """A choice for each range of heights."""
    choices = [Choice(low, high) for low, high in ranges(heights)]
    candidates = _timed(problem, choices, library)
    holds = _compare(problem, choices, candidates, library)
    for choice, offered, passed in zip(choices, candidates, holds, strict=True):
        for (us, algorithm), good in zip(offered, passed, strict=True):
            if good and not choice.algorithm:
                choice.algorithm, choice.us = algorithm.numpy().tobytes().hex(), us
                choice.what = library.describe(algorithm)
            elif not good:
                choice.refused.append(library.describe(algorithm))
        if 0 < choice.triton_us < 0.97 * choice.us:
            choice.triton = EVERYWHERE
        elif choice.triton_us and max(choice.triton_us, TRITON_HOST) < max(choice.us, CUBLASLT_HOST):
            choice.triton = OUTSIDE_GRAPHS
    return choices


def _timed(problem: Problem, choices: list[Choice], library: Library) -> list[list[tuple[float, Tensor]]]:
    """For each range the fastest algorithms with their time, fastest first."""
    copies = 2 * CACHE // (problem.dtype.itemsize * problem.n * problem.k) + 1
    a, bs, bias = operands(problem, "normal", problem.highest, copies)
    out = torch.empty(problem.highest, problem.n, dtype=problem.dtype, device=problem.device)
    found: list[list[tuple[float, Tensor]]] = []
    for choice in choices:
        tried = compared_heights(choice.low, choice.high, problem.highest)
        if not tried:
            found.append([])
            continue
        m = tried[-1]
        calls_of_each = max(8, copies) if m <= 1024 else max(2, OPERATIONS // (2 * m * problem.n * problem.k))
        weights = (bs * 8)[:calls_of_each]
        # for one row alone the heuristic may offer nothing but sums that threads share out; what serves two rows serves one
        offered: dict[bytes, Tensor] = {}
        for height in (m, 2) if m == 1 else (m,):
            for algorithm in library.algorithms(a[:height], bs[0], _rows(bias, height)):
                if library.run(out[:m], a[:m], bs[0], _rows(bias, m), algorithm):
                    offered.setdefault(algorithm.numpy().tobytes(), algorithm)
        if not offered:
            found.append([])
            continue

        def calls(
            run: Callable[..., object], *more: Any, m: int = m, weights: list[Tensor] = weights
        ) -> list[Callable[[], object]]:
            return [functools.partial(run, out[:m], a[:m], b, _rows(bias, m), *more) for b in weights]

        candidates = [calls(library.run, algorithm) for algorithm in offered.values()]
        times = library.microseconds(candidates + ([calls(reference)] if m <= FEW else []))
        if m <= FEW:
            choice.triton_us = times.pop()
        timed = sorted(zip(times, offered.values(), strict=True), key=lambda pair: pair[0])
        found.append(timed if m == 1 else timed[:COMPARED])
    return found


def _compare(
    problem: Problem, choices: list[Choice], candidates: list[list[tuple[float, Tensor]]], library: Library
) -> list[list[bool]]:
    """For each range and algorithm: whether every element has the reference's bits at every height, on every kind of data."""
    holds = [[True] * len(offered) for offered in candidates]
    for kind in KINDS:
        a, (b,), bias = operands(problem, kind, problem.highest)
        want, got = (
            torch.empty(problem.highest, problem.n, dtype=problem.dtype, device=problem.device) for _ in range(2)
        )
        reference(want, a, b, bias)
        for choice, offered, passed in zip(choices, candidates, holds, strict=True):
            for m in compared_heights(choice.low, choice.high, problem.highest):
                for i, (_, algorithm) in enumerate(offered):
                    got[:m].fill_(float("nan"))
                    ran = library.run(got[:m], a[:m], b, _rows(bias, m), algorithm)
                    passed[i] = passed[i] and ran and same_bits(got[:m], want[:m])
    return holds


# ---- what is kept on disk ----


@functools.cache
def circumstances(device: torch.device) -> dict[str, str]:
    """What a proof holds for: device, driver and libraries, and the source of the reference kernel and of this proof."""
    import triton

    digest = hashlib.sha256()
    for path in sorted([*Path(matmul.__file__).parent.glob("*.py"), Path(__file__)]):
        digest.update(path.read_bytes())
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": str(torch.ops.bi_compile_cuda.driver_version()),
        "cuBLASLt": str(torch.ops.bi_compile_cuda.library_version()),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "source": digest.hexdigest()[:16],
    }


def path_of(device: torch.device) -> Path:
    """The file with the proofs for this device."""
    words = json.dumps(circumstances(device), sort_keys=True)
    return build.EXTENSION.build_folder() / f"proofs_{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"


def read(path: Path) -> dict[str, list[Choice]]:
    """The proofs of a file by problem; none where there is no file or no whole one."""
    try:
        data = json.loads(path.read_text())
        return {name: [Choice(**choice) for choice in choices] for name, choices in data["proofs"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def keep(path: Path, problem: Problem, choices: list[Choice]) -> None:
    """Add a proof to the file; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        proofs = read(path) | {str(problem): choices}
        data: dict[str, Any] = {
            "circumstances": circumstances(problem.device),
            "proofs": {name: [dataclasses.asdict(c) for c in kept] for name, kept in proofs.items()},
        }
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(data, indent=1))
        written.replace(path)


# ---- the operator ----

_lock = threading.RLock()
_made = itertools.count(1)


def prove_and_pin(a: Tensor, b: Tensor, form: int, by_column: bool) -> None:
    """`bi_compile_cuda::prove`: pin an algorithm, or the Triton kernel, for products like this one, at every height."""
    problem = Problem(b.shape[1], b.shape[0], a.dtype, a.device, by_column, form)
    heights = torch.ops.bi_compile_cuda.heights()
    with _lock, torch.inference_mode(), torch.cuda.device(a.device):
        path = path_of(a.device)
        choices = read(path).get(str(problem))
        if choices is None or len(choices) != len(heights) + 1:
            made = next(_made)
            if made > MOST:
                if made == MOST + 1:
                    log.warning(
                        "bi_compile: %d products were proven in this process; the Triton kernel computes %s and others", MOST, problem
                    )  # fmt: skip
                return
            choices = _prove(problem, heights)
            if choices:
                keep(path, problem, choices)
    choices = choices or [Choice(low, high) for low, high in ranges(heights)]
    algorithms = [torch.frombuffer(bytearray.fromhex(c.algorithm), dtype=torch.uint8) if c.algorithm else torch.empty(0, dtype=torch.uint8) for c in choices]  # fmt: skip
    torch.ops.bi_compile_cuda.pin(a, b, form, algorithms, [c.triton for c in choices])


def _prove(problem: Problem, heights: Sequence[int]) -> list[Choice]:
    began = time.perf_counter()
    try:
        choices = prove(problem, heights, CuBlasLt())
    except torch.OutOfMemoryError:
        log.warning(
            "bi_compile: no memory is left to prove a native kernel for %s: the Triton kernel computes it", problem
        )
        return []
    finally:
        torch.cuda.empty_cache()
    native = sum(bool(c.algorithm) for c in choices)
    refused = sum(len(c.refused) for c in choices)
    log.info(
        "bi_compile: %s: cuBLASLt has the Triton kernel's bits in %d of %d ranges of heights, %d algorithms refused; the proof took %.1f s",
        problem, native, len(choices), refused, time.perf_counter() - began,
    )  # fmt: skip
    return choices
