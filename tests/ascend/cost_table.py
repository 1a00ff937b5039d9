"""The kernels' cost on paper, for each chip: docs/reference/ascend-costs.md.

    python tests/ascend/cost_table.py > docs/reference/ascend-costs.md      # lowers some 30 kernels for three chips, a few minutes

Counts come from the lowered code (`tests/helpers/costs.py`), times from them and the chips' published peaks. Estimates, all of it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import costs
import lowering
import torch
from triton.runtime.jit import JITFunction

from bi_compile.kernels.ascend import triton_kernels
from bi_compile.kernels.triton import launch, tiles

IMPLEMENTATIONS = triton_kernels()
BF16 = torch.bfloat16
#: what a cube core multiplies and adds in a cycle, in 16 bits (16 x 16 x 16), and the bytes of one vector instruction's repeat
MACS, REPEAT = 4096, 256


class Peak(NamedTuple):
    """16-bit products, in multiply-adds a second, and bytes a second from memory."""

    macs: float
    memory: float


#: one die of a 910C for A2 and A3: half of 752 TFLOPS (CloudMatrix384 paper, arXiv 2506.12708) and of 3,200 GB/s (DigiTimes, by
#: techpowerup.com/335749; no data sheet was found). None for the 950: for the 950PR 1.6 TB/s and 1 PFLOPS in 8 bits are announced,
#: but no rate in 16 bits
PEAKS = {"A2": Peak(188e12, 1.6e12), "A3": Peak(188e12, 1.6e12)}
CUBE = (
    "mm",
    "bmm_transposed",
    "grouped_mm",
    "paged_attention",
    "scaled_dot_product_attention",
    "addmm",
    "bmm",
    "baddbmm",
)


class Case(NamedTuple):
    operator: str
    shape: str
    run: Callable[[], Any]
    steps: int
    """Of the loop over K, keys or columns, for each program (their average)."""
    programs: int | None
    """That have work, where fewer than are launched."""
    least: float
    """Bytes that have to move: every operand once."""


def products() -> Iterator[Case]:
    n = k = 4096
    for m in (1, 16, 64, 128, 256, 4096):
        a, b, out = torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=BF16).t(), 2 * (m * k + n * k + m * n)
        yield Case("mm", f"{m} x {k} x {n}", lambda a=a, b=b: IMPLEMENTATIONS["mm"](a, b), k // 128, None, out)
    rows, experts, k, n = 2048, 128, 2048, 1536
    a, b = torch.empty(rows, k, dtype=BF16), torch.empty(experts, n, k, dtype=BF16).mT
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * (rows // experts)
    height = launch.choose(tiles.PRODUCT["npu"][2], rows // experts).height
    busy = experts * math.ceil(rows / experts / height) * n // 64
    yield Case(
        "grouped_mm", f"{rows} rows, {experts} experts {k} x {n}", lambda: IMPLEMENTATIONS["grouped_mm"](a, b, ends), k // 128, busy,
        2 * (rows * k + experts * k * n + rows * n),
    )  # fmt: skip


def attention() -> Iterator[Case]:
    heads, kv, d, page = 32, 8, 128, 128
    for name, requests, tokens, keys in (("decode", 1, 1, 2048), ("decode", 256, 1, 2048), ("prefill", 1, 2048, 2048)):
        q = torch.empty(requests * tokens, heads, d, dtype=BF16)
        k = torch.empty(requests * keys // page, page, kv, d, dtype=BF16)
        lengths, table = (
            torch.zeros(2, requests, dtype=torch.int32),
            torch.zeros(requests, keys // page, dtype=torch.int32),
        )
        height = tiles.ATTENTION["npu"][2][0][1].height
        tile_count = requests * kv * math.ceil(tokens * heads // kv / height)
        steps = keys // 64 if tokens == 1 else (keys // 64 + 1) // 2
        yield Case(
            "paged_attention", f"{name}: {requests} x {keys} keys, {heads} / {kv} heads of {d}",
            lambda q=q, k=k, ends=lengths, t=table: IMPLEMENTATIONS["paged_attention"](q, k, k, ends, t, right=0), steps, tile_count,
            2 * (2 * q.numel() + 2 * k.numel()),
        )  # fmt: skip

    q, k = torch.empty(1, heads, 2048, d, dtype=BF16), torch.empty(1, kv, 2048, d, dtype=BF16)
    yield Case(
        "scaled_dot_product_attention", "1 x 2048, causal, 32 / 8 heads of 128",
        lambda: IMPLEMENTATIONS["scaled_dot_product_attention"](q, k, k, None, True), (2048 // 64 + 1) // 2, None,
        2 * (2 * q.numel() + 2 * k.numel()),
    )  # fmt: skip


def experts() -> Iterator[Case]:
    """Gates of Qwen3-30B-A3B and DeepSeek-V3, and the sum over 8 experts of the first."""
    tokens, chosen = 256, 8
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "128 experts, softmax": (128, {"renorm": True}),
        "256 experts, sigmoid, 4 of 8 groups, bias": (
            256, {"k_group": 4, "groups": 8, "two_of_group": True, "sigmoid": True, "renorm": True, "bias": torch.empty(256)}
        ),
    }  # fmt: skip
    for name, (count, way) in ways.items():
        x = torch.empty(tokens, count, dtype=BF16)
        run: Callable[[], Any] = lambda x=x, w=way: IMPLEMENTATIONS["moe_gate"](x, chosen, **w)
        yield Case("moe_gate", f"{tokens} rows, {name}", run, 0, None, 6 * x.numel() + 6 * tokens * chosen)
    x, weights = torch.empty(tokens * chosen, 2048, dtype=BF16), torch.empty(tokens, chosen, dtype=BF16)
    at = torch.zeros(tokens * chosen, dtype=torch.int32)
    yield Case(
        "moe_combine", f"{tokens} tokens, {chosen} x 2048", lambda: IMPLEMENTATIONS["moe_combine"](x, at, weights), chosen, None,
        2 * (x.numel() + tokens * 2048),
    )  # fmt: skip


def latent_attention() -> Iterator[Case]:
    """DeepSeek-V3's keys, and its product with values of 16 heads, a rank's share of 128 on 8 ranks."""
    latent, rotated, heads, width = 512, 64, 16, 128
    for tokens in (16, 256):
        e: Callable[..., Any] = lambda *n: torch.empty(*n, dtype=BF16)
        kv, at, caches = (
            e(tokens, latent + rotated),
            torch.zeros(tokens, dtype=torch.int64),
            (e(9, 128, rotated), e(9, 128, latent)),
        )
        given = (kv, e(latent), e(tokens, rotated), e(tokens, rotated), at, *caches)
        run: Callable[[], Any] = lambda g=given: IMPLEMENTATIONS["latent_key"](*g, 1e-6)
        yield Case(
            "latent_key",
            f"{tokens} tokens of {latent} + {rotated}",
            run,
            0,
            None,
            2 * (3 * kv.numel() + 2 * tokens * rotated),
        )
        a, b = e(tokens, heads, latent).transpose(0, 1), e(heads, latent, width)
        yield Case(
            "bmm_transposed", f"{heads} x {tokens} x {latent} x {width}", lambda a=a, b=b: IMPLEMENTATIONS["bmm_transposed"](a, b), latent // 128,
            None, 2 * (a.numel() + b.numel() + tokens * heads * width),
        )  # fmt: skip


def rows() -> Iterator[Case]:
    calls: dict[str, tuple[Callable[..., Any], float]] = {
        "rms_norm": (lambda x, w: IMPLEMENTATIONS["rms_norm"](x, w, 1e-6), 2),
        "add_rms_norm": (lambda x, w: IMPLEMENTATIONS["add_rms_norm"](x, x, w, 1e-6), 4),
        "layer_norm": (lambda x, w: IMPLEMENTATIONS["layer_norm"](x, w, w, 1e-5), 2),
        "softmax": (lambda x, w: IMPLEMENTATIONS["softmax"](x, 1), 2),
        "log_softmax": (lambda x, w: IMPLEMENTATIONS["log_softmax"](x, 1), 2),
        "logsumexp": (lambda x, w: IMPLEMENTATIONS["logsumexp"](x, [1]), 1),
        "sum": (lambda x, w: IMPLEMENTATIONS["sum"](x, [1]), 1),
        "mean": (lambda x, w: IMPLEMENTATIONS["mean"](x, [1]), 1),
        "var_mean": (lambda x, w: IMPLEMENTATIONS["var_mean"](x, [1]), 1),
    }
    for (name, (call, passes)), count in itertools.product(calls.items(), (16, 256)):
        width = 151936 if "softmax" in name else 4096
        x, w = torch.empty(count, width, dtype=BF16), torch.empty(width, dtype=BF16)
        yield Case(
            name,
            f"{count} x {width}",
            lambda c=call, x=x, w=w: c(x, w),
            math.ceil(width / 4096),
            None,
            2 * passes * x.numel(),
        )


def others() -> Iterator[Case]:
    """The kernels that a decoder does not need: products with a bias or in batches, running sums, norms of groups."""
    m, n, k = 256, 4096, 4096
    a, b, bias = torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=BF16).t(), torch.empty(1, n, dtype=BF16)
    yield Case(
        "addmm",
        f"{m} x {k} x {n}",
        lambda: IMPLEMENTATIONS["addmm"](bias, a, b),
        k // 128,
        None,
        2 * (m * k + n * k + m * n + n),
    )
    x, y = torch.empty(32, 128, 512, dtype=BF16), torch.empty(32, 512, 128, dtype=BF16)
    full, least = torch.empty(32, 128, 128, dtype=BF16), 2 * (2 * x.numel() + 32 * 128 * 128)
    yield Case("bmm", "32 x 128 x 512 x 128", lambda: IMPLEMENTATIONS["bmm"](x, y), 4, None, least)
    yield Case(
        "baddbmm",
        "32 x 128 x 512 x 128",
        lambda: IMPLEMENTATIONS["baddbmm"](full, x, y),
        4,
        None,
        least + 2 * full.numel(),
    )
    rows, w = torch.empty(256, 4096, dtype=BF16), torch.empty(4096, dtype=BF16)
    yield Case("cumsum", "256 x 4096", lambda: IMPLEMENTATIONS["cumsum"](rows, 1), 4096, None, 4 * rows.numel())
    image = rows.view(256, 4096, 1)
    yield Case(
        "group_norm",
        "256 x 4096, 1 group",
        lambda: IMPLEMENTATIONS["group_norm"](image, w, w, 1, 1e-5),
        1,
        None,
        4 * rows.numel(),
    )


def launched(case: Case) -> tuple[lowering.Launch, int]:
    """The kernel that the operator launches for the shape, and how many programs of it."""
    grids: list[int] = []
    plain, before = JITFunction.run, launch.HOST

    def run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
        grids.append(grid[0])
        return plain(self, *args, grid=grid, **kwargs)

    JITFunction.run, launch.HOST = run, "npu"
    try:
        with lowering.captured() as found:
            case.run()
    finally:
        JITFunction.run, launch.HOST = plain, before
    return found[-1], grids[-1]


def line(case: Case, name: str, chip: str) -> str:
    kernel, programs = launched(case)
    module = lowering.lower(kernel, chip)
    if module.hivm is None:
        raise RuntimeError(f"{case.operator} {case.shape} on {chip}: {module.refusal}")
    programs = case.programs or programs
    cores, on = costs.cores(module.hivm), "cube" if case.operator in CUBE else "vector"
    waves = math.ceil(programs / cores[on])
    begin = [case.operator, case.shape, name, f"{programs}", f"{min(programs, cores[on])} of {cores[on]} {on}"]
    begin.append(f"{100 * programs / (waves * cores[on]):.0f} %")
    if name not in PEAKS:
        return "| " + " | ".join([*begin, *["-"] * 6]) + " |"
    each, peak = costs.work(module.hivm).of(case.steps), PEAKS[name]
    cycles = peak.macs / (cores["cube"] * MACS)
    moved = programs * (each["read"] + each["written"])
    times = {
        "memory": moved / peak.memory,
        "cube": waves * each["macs"] / MACS / cycles,
        "vector": waves * each["vector"] / cycles,
    }
    bound = max(times, key=lambda t: times[t])
    floor = max(case.least / peak.memory, programs * each["macs"] / peak.macs)
    cells = [
        *begin, f"{moved / 1e6:.1f} ({case.least / 1e6:.1f})", *(f"{1e6 * t:.1f}" for t in times.values()),
        f"{programs * each['single'] / 1e3:.1f}", f"{bound}, {100 * floor / times[bound]:.0f} %",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = f"""# Cost of the kernels on paper

**Estimates: none of this was measured on a chip.** The work that is written in the code which Ascend's compiler (triton-ascend 3.2.0,
bishengir-compile of ascendnpu-ir 1.2.0) lowers our kernels to, in bfloat16 at shapes of Qwen3-8B (experts: Qwen3-30B-A3B), and the
time that it would take at the chips' published peaks. Generated: `python tests/ascend/cost_table.py > docs/reference/ascend-costs.md`;
how it counts: `tests/helpers/costs.py`.

- Peaks: A2 and A3 are taken as one die of a 910C: half of its 752 TFLOPS in 16 bits (CloudMatrix384 paper, arXiv 2506.12708) and of its
  3,200 GB/s, which the press has ([DigiTimes, by TechPowerUp](https://www.techpowerup.com/335749)); no data sheet was found. Numbers
  of cores come from the compiler. A cube core does {MACS:,} multiply-adds a cycle (16 x 16 x 16), a vector core {REPEAT} bytes; the
  length of a cycle follows from the peak.
- Missing: **the times of a 950**, of which programs and cores alone are given. No rate of its products in 16 bits was found (for the
  950PR: 1.6 TB/s and, in 8 bits, 1 PFLOPS), and the compiler puts its loops and vector work into a form that is not read here.
- Programs: those with work. Busy: the share of the cores that has a program, over all rounds of programs.
- MB moved: what programs load and store, in brackets every operand once. Caches are not seen: what several programs read counts several
  times, and so does what cube and vector cores hand each other through memory on A2 and A3. So the memory time is too high where
  operands fit into the L2 cache.
- Vector time: every instruction at full speed, and all of a program on one vector core, though the compiler may share it between two.
- Single: thousands of elements that the scalar unit loads or stores one by one, of which no time is known.
- The last column: what bounds it, and the time of the least that has to be done (operands once, products at peak) as a share of it.

What followed from it:

- Attention's masks were in 64 bits, which the vector unit does not compare: for each block of 64 keys the scalar unit took 2,048 elements
  one by one, three times, and at the end it stored the 4,096 elements of the output one by one. Now they are in 32 bits, and the output is
  stored by rows. `scaled_dot_product_attention` stored its output so too, and wrote the whole tile to memory anew for each of the 4,096
  elements, 67 MB a program; now it stores by queries and heads, where a key head has 1, 2, 4, .. of them. What they compute is tested
  in Triton's interpreter; a chip has run neither form.
- At 64 and 128 rows a third of the cube cores idles in the second round of programs. Narrower tiles keep 89 % busy and move more: at a
  core's share of the bandwidth, 67 GB/s, 64 x 64 would take 48 us as 64 x 128 does, and 64 x 128 72 us where 128 x 128 takes 64. So the
  tiles stay.
- Decoding one request keeps as many cores busy as there are key heads, and 16 rows of a norm 16: a row's sum is not divided among cores.

| operator | shape | chip | programs | cores | busy | MB moved | memory us | cube us | vector us | single | bound, share |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    cases = list(itertools.chain(products(), attention(), latent_attention(), experts(), rows(), others()))
    print(HEADER + "\n".join(line(case, name, chip) for case in cases for name, chip in lowering.CHIPS.items()))


if __name__ == "__main__":
    main()
