"""On a CUDA device: products, row operators, attention and whole decode steps, their bits checked, replayed from CUDA graphs; and engines."""

from __future__ import annotations

import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .measured import Benchmark, Measured, geometric_mean
from .serving import engine, two_ranks

#: model -> {product: (N, K)}
PRODUCTS = {
    "Qwen3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "Qwen3-0.6B": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CACHE = 50 * 2**20
"""Bytes of an H100's second-level cache: weights rotate through three times as much, as a model's do."""


def replay_times(functions: Sequence[Callable[[], Any]], rounds: int = 20) -> list[float]:
    """The median time of each function's CUDA graph, in milliseconds; the graphs take turns, which triton.testing.do_bench
    cannot let them do. Before each, the second-level cache is filled with what none of them uses: a graph would begin with its
    inputs there, or with the results of another one that are yet to be written to memory."""
    unused = torch.zeros(CACHE, device="cuda")  # four times as many bytes
    graphs = []
    for f in functions:
        f()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f()
        graph.replay()
        graphs.append(graph)
    events = [[(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in functions] for _ in range(rounds)]
    for turn in events:
        for graph, (start, end) in zip(graphs, turn, strict=True):
            torch.amax(unused)
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return [statistics.median(turn[i][0].elapsed_time(turn[i][1]) for turn in events) for i in range(len(functions))]


def _persistent() -> Callable[[Tensor, Tensor], Tensor] | None:
    """thinking-machines' invariant product, which vLLM's batch-invariant mode has too; None where neither is installed."""
    for module in ("batch_invariant_ops", "vllm.model_executor.layers.batch_invariant"):
        try:
            found: Callable[[Tensor, Tensor], Tensor] = importlib.import_module(module).matmul_persistent
        except (ImportError, AttributeError):
            continue
        return found
    return None


def product() -> Measured:
    """x[M, K] @ w[N, K]^T: bi_compile::mm against torch.mm and, of 16 bits, thinking-machines' product; weights from memory."""
    table = Measured(
        "Product",
        ("model", "dtype", "product", "M", "torch us", "bi_compile us", "ratio", "torch varies", "ours varies", "thinking-machines us"),
    )  # fmt: skip
    peer = _persistent()
    few: list[float] = []
    many: list[float] = []
    for model, dtype in (*((model, torch.bfloat16) for model in PRODUCTS), ("Qwen3-0.6B", torch.float32)):
        functions: list[Any] = [torch.mm, ops.mm]
        if peer is not None and dtype == torch.bfloat16:
            functions.append(peer)
        for name, (n, k) in PRODUCTS[model].items():
            torch.manual_seed(0)
            copies = 3 * CACHE // (dtype.itemsize * n * k) + 1
            weights = [torch.randn(n, k, device="cuda", dtype=dtype).t() for _ in range(copies)]
            every = torch.randn(max(ROWS), k, device="cuda", dtype=dtype)
            alone = {f: f(every[:1], weights[0]) for f in (torch.mm, ops.mm)}
            for m in ROWS:
                x = every[:m]
                varies = {f: not torch.equal(f(x, weights[0])[:1], alone[f]) for f in (torch.mm, ops.mm)}
                calls = max(copies, 8) if m <= 1024 else 2

                def run(f: Any, x: Tensor = x, weights: list[Tensor] = weights, calls: int = calls) -> None:
                    for w in itertools.islice(itertools.cycle(weights), calls):
                        f(x, w)

                theirs, ours, *third = (
                    t / calls * 1e3
                    for t in replay_times([lambda f=f, run=run: run(f) for f in functions])  # type: ignore[misc]
                )
                if model == "Qwen3-8B":
                    (few if m <= 256 else many).append(theirs / ours)
                table.add_row(
                    model, str(dtype).removeprefix("torch."), name, str(m), f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}",
                    _yes(varies[torch.mm]), _yes(varies[ops.mm]), f"{third[0]:.1f}" if third else "-",
                )  # fmt: skip
    table.line = (
        f"Qwen3-8B in bfloat16: M <= 256 geometric mean {geometric_mean(few):.3f}, least {min(few):.2f}; "
        f"M >= 512 {geometric_mean(many):.3f}, least {min(many):.2f}"
    )
    return table


def _yes(b: bool) -> str:
    return "yes" if b else "no"


def _rms_norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def _add_rms_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return _rms_norm(s, w), s


#: how often a graph of row operators reads its inputs, so that what it leaves in the cache counts for little
PASSES = 4


def rows() -> Measured:
    """Row operators in bfloat16 against a copy that moves no more bytes, and against what Inductor makes of the plain definition."""
    table = Measured("Rows", ("operator", "shape", "us", "of a copy's bandwidth", "Inductor us", "Inductor / ours"))
    for columns in (4096, 8192):
        torch.manual_seed(0)
        xs = [torch.randn(4096, columns, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        w = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
        cases: dict[str, tuple[Any, Any, float]] = {
            # name: (ours, plain, tensors of x's size that are read or written)
            "rms_norm": (lambda x, y: ops.rms_norm(x, w, 1e-6), lambda x, y: _rms_norm(x, w), 2),
            "add_rms_norm": (lambda x, y: ops.add_rms_norm(x, y, w, 1e-6), lambda x, y: _add_rms_norm(x, y, w), 4),
            "softmax": (lambda x, y: ops.softmax(x, -1), lambda x, y: torch.softmax(x, -1), 2),
            "sum": (lambda x, y: ops.sum(x, [-1], False), lambda x, y: x.sum(-1), 1),
            "cumsum": (lambda x, y: ops.cumsum(x, -1), lambda x, y: x.cumsum(-1), 2),
        }
        outs = [torch.empty_like(x) for x in xs]
        for name, (ours, plain, moved) in cases.items():
            torch._dynamo.reset()
            compiled = torch.compile(plain)

            def over(f: Any, xs: list[Tensor] = xs) -> None:
                for x, y in PASSES * list(zip(xs, xs[1:] + xs[:1], strict=True)):
                    f(x, y)

            # a launch costs a small copy more of its time than a large one
            share = min(moved / 2, 1)

            def copies(outs: list[Tensor] = outs, xs: list[Tensor] = xs, part: int = int(4096 * share)) -> None:
                for o, x in PASSES * list(zip(outs, xs, strict=True)):
                    o[:part].copy_(x[:part])

            copy, mine, theirs = (
                t / PASSES / len(xs) * 1e3 for t in replay_times([copies, lambda: over(ours), lambda: over(compiled)])
            )
            table.add_row(
                name, f"4096 x {columns}", f"{mine:.1f}", f"{copy * moved / 2 / share / mine:.2f}", f"{theirs:.1f}", f"{theirs / mine:.2f}"
            )  # fmt: skip
    return table


#: (query heads, key heads, elements of a head), queries, keys, sequences
ATTENTION = [
    *(((16, 8, 128), 1, keys, n) for keys in (512, 4096, 32768) for n in (1, 16, 64) if keys * n < 2**20),
    *(((16, 8, 64), 1, keys, n) for keys in (512, 4096, 32768) for n in (1, 16)),
    ((16, 8, 128), 2048, 2048, 1),
    ((16, 8, 128), 8192, 8192, 1),
]


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | None:
    """FlashAttention 3 as vLLM calls it, keys in pages of 16; None without vLLM."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    rows = q.transpose(1, 2).reshape(-1, heads, size)
    pages = [x.transpose(1, 2).reshape(-1, 16, k.shape[1], size).contiguous() for x in (k, v)]
    numbers: dict[str, Any] = {"device": q.device, "dtype": torch.int32}
    table = torch.arange(batch * keys // 16, **numbers).view(batch, -1)
    starts, used = torch.arange(0, (batch + 1) * queries, queries, **numbers), torch.full((batch,), keys, **numbers)
    return lambda: flash_attn_varlen_func(
        q=rows, k=pages[0], v=pages[1], cu_seqlens_q=starts, max_seqlen_q=queries, seqused_k=used, max_seqlen_k=keys,
        causal=queries > 1, block_table=table, fa_version=3,
    )  # fmt: skip


def attention() -> Measured:
    """bi_compile::scaled_dot_product_attention against PyTorch's and, with vLLM, FlashAttention 3; caches from memory."""
    table = Measured(
        "Attention",
        ("heads", "queries", "keys", "sequences", "PyTorch us", "FA3 us", "bi_compile us", "PyTorch / ours", "FA3 / ours", "PyTorch varies", "ours varies"),
    )  # fmt: skip
    ratios = []
    for (heads, kv_heads, size), queries, keys, batch in ATTENTION:
        torch.manual_seed(0)
        copies = max(1, min(8, 3 * CACHE // (4 * batch * kv_heads * keys * size)))
        cases = []
        for _ in range(copies):
            q = torch.randn(batch, queries, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            k, v = torch.randn(2, batch, kv_heads, keys, size, device="cuda", dtype=torch.bfloat16).unbind(0)
            cases.append((q, k, v))

        def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = queries > 1) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool = queries > 1) -> Tensor:
            return ops.scaled_dot_product_attention(q, k, v, None, causal)[0]

        q, k, v = cases[0]
        varies = [not torch.equal(f(q[-1:], k[-1:], v[-1:]), f(q, k, v)[-1:]) for f in (plain, ours)]
        flash = [_flash_attention(*case) for case in cases]
        functions: list[Callable[[], Any]] = [lambda f=f, c=cases: [f(*x) for x in c] for f in (plain, ours)]  # type: ignore[misc]
        if None not in flash:
            functions.append(lambda flash=flash: [f() for f in flash])  # type: ignore[misc]
        theirs, mine, *third = (t / copies * 1e3 for t in replay_times(functions))
        ratios.append(theirs / mine)
        table.add_row(
            f"{heads}, {kv_heads} of {size}", str(queries), str(keys), str(batch), f"{theirs:.1f}", *([f"{third[0]:.1f}"] if third else ["-"]),
            f"{mine:.1f}", f"{theirs / mine:.2f}", *([f"{third[0] / mine:.2f}"] if third else ["-"]), *(_yes(x) for x in varies),
        )  # fmt: skip
    table.line = f"PyTorch / ours: geometric mean {geometric_mean(ratios):.2f}, least {min(ratios):.2f}"
    return table


class Layer(nn.Module):
    """A decoder layer of Qwen3's shape that writes one token's keys and values behind those of a cache, and attends to all."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * 128, bias=False)
        self.o = nn.Linear(heads * 128, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.norms = nn.ParameterList(torch.ones(n) for n in (hidden, hidden, 128, 128))

    def forward(self, x: Tensor, residual: Tensor, rope: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = _add_rms_norm(x, residual, self.norms[0])
        q, k, v = self.qkv(x).view(x.shape[0], -1, 128).split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = (self._rotate(_rms_norm(t, w), rope) for t, w in ((q, self.norms[2]), (k, self.norms[3])))
        keys[:, :, -1] = k
        values[:, :, -1] = v
        y = nn.functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)
        x, residual = _add_rms_norm(self.o(y.reshape(x.shape[0], -1)), residual, self.norms[1])
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up), residual

    @staticmethod
    def _rotate(x: Tensor, rope: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = rope
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, kv_heads, inner) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(hidden))

    def forward(self, tokens: Tensor, rope: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = self.embedding(tokens)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, rope, keys, values)
        return nn.functional.linear(_add_rms_norm(x, residual, self.norm)[0], self.embedding.weight)


MODELS = {
    "Qwen3-0.6B": dict(layers=28, hidden=1024, heads=16, kv_heads=8, inner=3072, vocabulary=151936),
    "Qwen3-8B, 12 layers": dict(layers=12, hidden=4096, heads=32, kv_heads=8, inner=12288, vocabulary=151936),
}
CONTEXT = 512


def step() -> Measured:
    """A decode step with 512 tokens of keys and values, compiled: the backend bi_ascend against Inductor alone."""
    from ..backend import bi_ascend

    table = Measured(
        "Decode step", ("model", "batch", "Inductor ms", "bi_ascend ms", "ratio", "Inductor varies", "bi_ascend varies")
    )
    for name, sizes in MODELS.items():
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = Model(**sizes).bfloat16().eval()
            for p in model.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.03)
            tokens = torch.randint(0, sizes["vocabulary"], (512,))
            cache = [torch.randn(512, sizes["kv_heads"], CONTEXT, 128, dtype=torch.bfloat16) for _ in range(2)]
            rope = torch.randn(2, 64, dtype=torch.bfloat16)
        faces: dict[str, Any] = {}
        alone: dict[str, Tensor] = {}
        for face, options in (("inductor", {}), ("bi_ascend", {"backend": bi_ascend})):
            faces[face] = torch.compile(model, dynamic=True, **options)  # type: ignore[call-overload]
        for batch in (1, 8, 32, 128, 512):
            inputs = (tokens[:batch], rope, *(c[:batch] for c in cache))
            times, varies = [], []
            with torch.no_grad():
                for face, compiled in faces.items():
                    row = compiled(*inputs)[:1].clone()
                    varies.append(not torch.equal(alone.setdefault(face, row), row))
                times = replay_times([lambda f=f, i=inputs: f(*i) for f in faces.values()])  # type: ignore[misc]
            table.add_row(
                name, str(batch), *(f"{t:.3f}" for t in times), f"{times[0] / times[1]:.3f}", *(_yes(v) for v in varies)
            )
        del model, cache, faces
    return table


CALLS = 200
"""Calls between two waits for the device: fewer than its queue holds, so that the host never waits for it."""


def host_times(
    functions: Sequence[tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]], rounds: int = 15
) -> list[list[float]]:
    """Microseconds of the host for one call of each function within its context, the mean of CALLS calls, round by round, ascending; they
    take turns.

    torch.utils.benchmark.Timer would wait for the device before it reads the clock. The first round warms up and is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for (f, context), found in zip(functions, times, strict=True):
            with context():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(CALLS):
                    f()
                found.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return [sorted(found[1:]) for found in times]


def host() -> Measured:
    """What a call costs the host: 4 rows of 1024 in bfloat16, and 4 of 4096 by a weight that the device reads for longer than the host needs;
    ours by itself, as compiled code calls it, and PyTorch's where the eager fallback replaces it. The bits against the Triton kernels'."""
    from .. import eager
    from ..kernels.triton import IMPLEMENTATIONS
    from ..options import Options

    torch.manual_seed(0)
    x, residual, rows = (torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16) for n in (4, 4, 1024))
    w, weight = rows.t(), rows[0]
    wide, large = (
        torch.randn(4, 4096, device="cuda", dtype=x.dtype),
        torch.randn(4096, 4096, device="cuda", dtype=x.dtype).t(),
    )
    heads = torch.randn(16, 4, 128, device="cuda", dtype=x.dtype)
    query, keys = (torch.randn(1, h, n, 128, device="cuda", dtype=x.dtype) for h, n in ((16, 1), (8, 512)))
    cases: dict[str, tuple[tuple[Any, ...], Callable[[], Any]]] = {
        # operator, and its weight where that is another: (arguments, PyTorch's call)
        "mm": ((x, w), lambda: torch.mm(x, w)),
        "addmm": ((weight, x, w), lambda: torch.addmm(weight, x, w)),
        "mm, 4096 by 4096": ((wide, large), lambda: torch.mm(wide, large)),
        "rms_norm": ((x, weight, 1e-6), lambda: nn.functional.rms_norm(x, (1024,), weight, 1e-6)),
        "add_rms_norm": ((x, residual, weight, 1e-6), lambda: nn.functional.rms_norm(x + residual, (1024,), weight, 1e-6)),
        "softmax": ((x, -1), lambda: torch.softmax(x, -1)),
        "sum": ((x, [-1]), lambda: torch.sum(x, -1)),
        "layer_norm": ((x, weight, None, 1e-6), lambda: nn.functional.layer_norm(x, (1024,), weight, None, 1e-6)),
        "bmm": ((heads, heads.mT), lambda: torch.bmm(heads, heads.mT)),
        "scaled_dot_product_attention": (
            (query, keys, keys), lambda: nn.functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
        ),
    }  # fmt: skip
    table = Measured(
        "Host time", ("operator", "torch us", "bi_compile us", "least", "most", "ratio", "eager fallback us", "bits")
    )
    fallback = eager.prepare(Options(), "cuda")
    with torch.inference_mode():
        calls: list[tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]] = []
        same = []
        for name, (args, plain) in cases.items():
            operator = name.split(",")[0]
            ours = getattr(ops, operator)
            got, want = ours(*args), IMPLEMENTATIONS[operator](*args)
            pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
            same.append(all(torch.equal(g, w) for g, w in pairs))
            calls += [(plain, nullcontext), (lambda f=ours, a=args: f(*a), nullcontext), (plain, fallback.installed)]  # type: ignore[misc]
        times = host_times(calls)
    for name, equal, theirs, mine, replaced in zip(cases, same, times[::3], times[1::3], times[2::3], strict=True):
        median, other = statistics.median(mine), statistics.median(theirs)
        table.add_row(
            name, f"{other:.1f}", f"{median:.1f}", f"{mine[0]:.1f}", f"{mine[-1]:.1f}", f"{other / median:.2f}",
            f"{statistics.median(replaced):.1f}", "equal" if equal else "DIFFER",
        )  # fmt: skip
    return table


BENCHES: dict[str, Benchmark] = {
    "product": product, "rows": rows, "attention": attention, "host": host, "step": step, "engine": engine,
}  # fmt: skip
if torch.cuda.device_count() > 1:
    BENCHES["ranks"] = two_ranks
#: benchmark -> the modules that it needs beside this package's own requirements
NEEDS: dict[str, tuple[str, ...]] = dict.fromkeys(("engine", "ranks"), ("vllm", "transformers"))
