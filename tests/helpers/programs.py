"""Programs drawn at random, of what has varied under a compiler: chains of pointwise functions with where, odd widths, slices,
short inner dimensions, ties, writes, sums, products and graph breaks.

    python tests/helpers/programs.py 300 [bi_ascend|inductor] [first seed]

compiles so many with default settings and says of how many a row differs among others, of how many none does, and what was
refused.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor], Tensor]

UNARY: dict[str, Step] = {
    "exp": lambda x: torch.exp(x.clamp(-8, 8)),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "celu": F.celu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "lgamma": lambda x: torch.lgamma(x.abs() + 0.5),
    "sin": torch.sin,
    "expm1": lambda x: torch.expm1(x.clamp(-8, 8)),
    "log1p": lambda x: torch.log1p(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "erf": torch.erf,
    "power": lambda x: (x.abs() + 0.1) ** 1.3,
    "relu": torch.relu,
}


def _unary(draw: random.Random, width: int) -> tuple[str, Step, int]:
    name = draw.choice(list(UNARY))
    return name, UNARY[name], width


def _where(draw: random.Random, width: int) -> tuple[str, Step, int]:
    a, b = draw.choice(list(UNARY)), draw.choice(list(UNARY))
    f, g = UNARY[a], UNARY[b]
    return f"where({a}, {b})", lambda x: torch.where(x > 0.1, f(x), g(x)), width


def _masked(draw: random.Random, width: int) -> tuple[str, Step, int]:
    name = draw.choice(list(UNARY))
    f = UNARY[name]
    return f"masked({name})", lambda x: f(x).masked_fill(x < -0.3, 0.25), width


def _slice(draw: random.Random, width: int) -> tuple[str, Step, int]:
    n = draw.choice([1, 2, 3, 5, 7, max(width - 1, 1)])
    n = min(n, width)
    start = draw.randrange(width - n + 1)
    return f"[:, {start}:{start + n}]", lambda x: x[:, start : start + n], n


def _widen(draw: random.Random, width: int) -> tuple[str, Step, int]:
    n = draw.choice([2, 3, 5])
    other = torch.randn(n, generator=torch.Generator().manual_seed(width))
    return f"[B, {width}, 1] * [{n}]", lambda x: (x.unsqueeze(-1) * other.to(x.dtype)).flatten(1), width * n


def _cat(draw: random.Random, width: int) -> tuple[str, Step, int]:
    name = draw.choice(list(UNARY))
    f = UNARY[name]
    return f"cat(x, {name})", lambda x: torch.cat([x, f(x)], 1), 2 * width


def _linear(draw: random.Random, width: int) -> tuple[str, Step, int]:
    n = draw.choice([3, 17, 40])
    w = torch.randn(n, width, generator=torch.Generator().manual_seed(n)) / width**0.5
    return f"linear({n})", lambda x: F.linear(x, w.to(x.dtype)), n


def _row(draw: random.Random, width: int) -> tuple[str, Step, int]:
    found: dict[str, Step] = {
        "softmax": lambda x: x.softmax(-1),
        "layer_norm": lambda x: F.layer_norm(x, [width]),
        "x - mean": lambda x: x - x.mean(-1, keepdim=True),
        "x / norm": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1),
        "cumsum": lambda x: x.cumsum(-1) / width,
        "x - max": lambda x: x - x.amax(-1, keepdim=True),
        "sum": lambda x: x + x.sum(-1, keepdim=True),
    }
    name = draw.choice(list(found))
    return name, found[name], width


def _ties(draw: random.Random, width: int) -> tuple[str, Step, int]:
    k = draw.randrange(1, width + 1)
    found: dict[str, tuple[Step, int]] = {
        f"topk({k})": (lambda x: x.round().topk(k, -1).indices.to(x.dtype), k),
        "argsort": (lambda x: x.round().argsort(-1).to(x.dtype), width),
        "stable sort": (lambda x: x.round().sort(dim=-1, stable=True).indices.to(x.dtype), width),
        "argmax": (lambda x: x + x.round().argmax(-1, keepdim=True), width),
    }
    name = draw.choice(list(found))
    return name, *found[name]


def _writes(draw: random.Random, width: int) -> tuple[str, Step, int]:
    index = torch.tensor([draw.randrange(width) for _ in range(width)])

    def scattered(x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter(1, index.expand(x.shape[0], -1), x)

    def added(x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add(1, index.expand(x.shape[0], -1), x)

    def put(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, index] = x
        return y

    name, step = draw.choice([("scatter", scattered), ("scatter_add", added), ("index_put", put)])
    return name, step, width


def _break(draw: random.Random, width: int) -> tuple[str, Step, int]:
    name = draw.choice(list(UNARY))
    f = UNARY[name]

    def step(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return f(x)

    return f"break, {name}", step, width


@torch._dynamo.disable
def _plainly(f: Step, x: Tensor) -> Tensor:
    return f(x)


def _disabled(draw: random.Random, width: int) -> tuple[str, Step, int]:
    name, f, width = draw.choice([_unary, _row, _linear, _where])(draw, width)
    return f"uncompiled {name}", lambda x: _plainly(f, x), width


#: what is drawn, with how often
STEPS = (
    [_unary] * 3
    + [_where] * 4
    + [_masked] * 3
    + [_slice] * 4
    + [_widen, _cat, _linear, _row, _row, _ties, _writes, _break, _disabled]
)


@dataclasses.dataclass
class Program:
    """A function of [B, width], row by row."""

    seed: int

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.width = width = draw.choice([1, 2, 3, 5, 7, 13, 15, 17, 31, 33, 63, 65, 129, 257])
        self.dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
        self.dynamic = draw.choice([True, False, None])
        self.batch = draw.choice([2, 5, 16, 33])
        self.steps: list[Step] = []
        names = []
        for _ in range(draw.randrange(1, 6)):
            name, step, width = draw.choice(STEPS)(draw, width)
            if width > 2000:
                break
            names.append(name)
            self.steps.append(step)
        self.text = (
            f"seed {self.seed}: {self.dtype} [{self.batch}, {self.width}], dynamic={self.dynamic}: {' | '.join(names)}"
        )

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def outcome(program: Program, backend: str, options: dict[str, Any] | None = None) -> str:
    """ "equal", "differs" (a row alone and first, in the middle or last among others), or "refused: " with the reason."""
    from support import same_bits

    torch._dynamo.reset()
    x = torch.randn(program.batch, program.width, generator=torch.Generator().manual_seed(program.seed)).to(
        program.dtype
    )

    def run(x: Tensor) -> Any:
        return program(x)

    compiled = torch.compile(run, backend=backend, dynamic=program.dynamic, options=options)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            together = compiled(x)
            places = sorted({0, program.batch // 2, program.batch - 1})
            equal = all(same_bits(together[i : i + 1], compiled(x[i : i + 1])) for i in places)
    except Exception as error:
        text = " ".join(str(error).split())
        start = text.find("not known to be batch-invariant")
        return f"refused: {type(error).__name__} {text[max(start, 0) :][:300]}"
    return "equal" if equal else "differs"


def main(n: int, backend: str = "bi_ascend", first: int = 0) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + n):
        program = Program(seed)
        found = outcome(program, backend)
        counts[found.partition(":")[0]] += 1
        if found != "equal":
            print(program.text, "->", found, flush=True)
        if seed % 10 == 9:
            print(seed + 1, dict(counts), flush=True)
    print(backend, dict(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
