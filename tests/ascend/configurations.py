"""Every kernel configuration that an operator can choose on Ascend, and the table of docs/reference/ascend-kernels.md.

    python tests/ascend/configurations.py > docs/reference/ascend-kernels.md     # lowers each for each chip, half an hour
    python tests/ascend/configurations.py paged_attention > new.md               # these operators, and lines that the page lacks

A configuration is made by calling the operator's own host function, with the tiles of an NPU.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import lowering
import torch
from torch import Tensor

from bi_compile.kernels.ascend import moe, triton_kernels
from bi_compile.kernels.triton import launch, tiles

IMPLEMENTATIONS = triton_kernels()
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: the columns that a program of a row kernel can hold, each a kernel of its own
WIDTHS = [2**n for n in range(tiles.ROWS["npu"][0].bit_length())]
HEADS = [16, 32, 64, 128, 256, 512]
N, K = 512, 1024
#: memories as HIVM and as the document call them
NAMES = {"ub": "UB", "cbuf": "L1", "cc": "L0C"}


class Configuration(NamedTuple):
    operator: str
    dtype: str
    tile: str
    variant: str
    run: Callable[[], Any]


def empty(*shape: int, dtype: str) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype])


def strided(*shape: int, dtype: str) -> Tensor:
    """A view none of whose dimensions is contiguous."""
    return empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def with_wide_offsets(a: Tensor, b: Tensor) -> Tensor:
    """The product as it is launched for tensors too large for 32-bit offsets."""
    limit, launch.INT32_MAX = launch.INT32_MAX, 0
    try:
        return IMPLEMENTATIONS["mm"](a, b)
    finally:
        launch.INT32_MAX = limit


def products() -> Iterator[Configuration]:
    rows: Callable[..., Tensor] = lambda r, c, dtype: empty(r, c, dtype=dtype)
    columns: Callable[..., Tensor] = lambda r, c, dtype: empty(c, r, dtype=dtype).t()
    layouts = {"a @ w.t()": (rows, columns), "a @ w": (rows, rows), "a.t() @ w": (columns, rows)}
    for dtype in DTYPES:
        for limit, tile in tiles.PRODUCT["npu"][DTYPES[dtype].itemsize]:
            m, name = (
                min(limit, 4096),
                f"{tile.height} x {tile.width} x {tiles.PRODUCT_K['npu'][DTYPES[dtype].itemsize]}",
            )
            for layout, (a, b) in layouts.items():
                operands = a(m, K, dtype), b(K, N, dtype)
                yield Configuration("mm", dtype, name, layout, lambda o=operands: IMPLEMENTATIONS["mm"](*o))
            yield Configuration("mm", dtype, name, "64-bit offsets", lambda o=operands: with_wide_offsets(*o))
            apart = strided(m, K, dtype=dtype), strided(K, N, dtype=dtype)
            yield Configuration("mm", dtype, name, "strided", lambda o=apart: IMPLEMENTATIONS["mm"](*o))
            biased = empty(1, N, dtype=dtype), rows(m, K, dtype), columns(K, N, dtype)
            run: Callable[..., Any] = lambda o=biased, **scale: IMPLEMENTATIONS["addmm"](*o, **scale)
            yield Configuration("addmm", dtype, name, "bias", run)
            yield Configuration("addmm", dtype, name, "scaled", lambda f=run: f(beta=0.5, alpha=2))
            batched = empty(3, m, K, dtype=dtype), empty(3, K, N, dtype=dtype)
            yield Configuration("bmm", dtype, name, "", lambda o=batched: IMPLEMENTATIONS["bmm"](*o))
            transposed = empty(m, 3, K, dtype=dtype).transpose(0, 1), batched[1]
            for variant, o in {"batches first": batched, "rows first": transposed}.items():
                run = lambda o=o: IMPLEMENTATIONS["bmm_transposed"](*o)
                yield Configuration("bmm_transposed", dtype, name, variant, run)
            ends = torch.tensor([m, 2 * m, 3 * m], dtype=torch.int32)
            for layout, w in {
                "a @ w": empty(3, K, N, dtype=dtype),
                "a @ w.t()": empty(3, N, K, dtype=dtype).mT,
            }.items():
                grouped = batched[0].view(-1, K), w, ends
                group: Callable[..., Any] = lambda *bias, o=grouped: IMPLEMENTATIONS["grouped_mm"](*o, *bias)
                yield Configuration("grouped_mm", dtype, name, layout, group)
            biases = empty(3, N, dtype=dtype)
            yield Configuration("grouped_mm", dtype, name, "bias", lambda f=group, b=biases: f(b))
            yield Configuration(
                "grouped_mm", dtype, name, "counts", lambda o=grouped: IMPLEMENTATIONS["grouped_mm"](*o, counts=True)
            )
            full = empty(3, m, N, dtype=dtype)
            yield Configuration("baddbmm", dtype, name, "", lambda f=full, o=batched: IMPLEMENTATIONS["baddbmm"](f, *o))


def row_kernels() -> Iterator[Configuration]:
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        **{name: lambda x, w, f=IMPLEMENTATIONS[name]: f(x, [1]) for name in ("sum", "mean", "var_mean", "logsumexp")},
        **{name: lambda x, w, f=IMPLEMENTATIONS[name]: f(x, 1) for name in ("softmax", "log_softmax")},
        "rms_norm": lambda x, w: IMPLEMENTATIONS["rms_norm"](x, w, 1e-6),
        "rms_norm of a view": lambda x, w: IMPLEMENTATIONS["rms_norm"](
            x.new_empty(64, 2 * x.shape[1])[:, : x.shape[1]], w, 1e-6
        ),
        "add_rms_norm": lambda x, w: IMPLEMENTATIONS["add_rms_norm"](x, x, w, 1e-6),
        "layer_norm": lambda x, w: IMPLEMENTATIONS["layer_norm"](x, w, w, 1e-5),
        "group_norm": lambda x, w: IMPLEMENTATIONS["group_norm"](x[:, :, None].expand(-1, -1, 2), w, w, 1, 1e-5),
    }
    for operator, dtype, width in itertools.product(calls, DTYPES, WIDTHS):
        if dtype == "float16" and width != WIDTHS[-1]:
            continue  # the buffers of bfloat16
        x, w = empty(64, width, dtype=dtype), empty(width, dtype=dtype)
        yield Configuration(
            operator,
            dtype,
            f"{WIDTHS[0]} to {WIDTHS[-1]} columns",
            str(width),
            lambda c=calls[operator], x=x, w=w: c(x, w),
        )
    for dtype in DTYPES:
        x = empty(64, 100, dtype=dtype)
        yield Configuration("cumsum", dtype, f"{tiles.SCAN_ROWS} rows", "", lambda x=x: IMPLEMENTATIONS["cumsum"](x, 1))


def attention() -> Iterator[Configuration]:
    for dtype, head in itertools.product(DTYPES, HEADS):
        if head > tiles.LONGEST_HEAD["npu"][DTYPES[dtype].itemsize]:
            continue
        q, k = empty(1, 8, 64, head, dtype=dtype), empty(1, 2, 300, head, dtype=dtype)
        masks: dict[str, tuple[Any, bool]] = {
            "all keys": (None, False), "causal": (None, True), "bool mask": (torch.empty(64, 300, dtype=torch.bool), False),
            "float mask": (empty(64, 300, dtype=dtype), False),
        }  # fmt: skip
        for variant, (mask, causal) in masks.items():
            run = lambda q=q, k=k, m=mask, c=causal: IMPLEMENTATIONS["scaled_dot_product_attention"](q, k, k, m, c)
            yield Configuration("scaled_dot_product_attention", dtype, f"heads of {head}", variant, run)


def paged_attention() -> Iterator[Configuration]:
    lengths, table = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(5, 40, dtype=torch.int32)
    for dtype, head in itertools.product(DTYPES, HEADS):
        if head > tiles.LONGEST_HEAD["npu"][DTYPES[dtype].itemsize]:
            continue
        q = empty(64, 8, head, dtype=dtype)
        keys: dict[str, tuple[Any, ...]] = {
            "packed": (empty(300, 2, head, dtype=dtype), None), "pages of 16": (empty(9, 16, 2, head, dtype=dtype), table),
            "pages of 128": (empty(9, 128, 2, head, dtype=dtype), table),
        }  # fmt: skip
        if head > tiles.LONGEST_HEAD_GATHERED["npu"][DTYPES[dtype].itemsize]:
            del keys["pages of 16"]
        for variant, (k, t) in keys.items():
            run = lambda q=q, k=k, t=t: IMPLEMENTATIONS["paged_attention"](q, k, k, lengths, t, right=0)
            yield Configuration("paged_attention", dtype, f"heads of {head}", variant, run)
        if head == tiles.LONGEST_HEAD["npu"][2]:  # latent attention (MLA): one key head, its rotated part apart
            q, k, q_rope, k_rope = (
                empty(*n, dtype=dtype) for n in ((64, 16, 512), (9, 128, 1, 512), (64, 16, 64), (9, 128, 1, 64))
            )
            run = lambda q=q, k=k, r={"query_rope": q_rope, "key_rope": k_rope}: IMPLEMENTATIONS["paged_attention"](
                q, k, k, lengths, table, right=0, **r
            )
            yield Configuration("paged_attention", dtype, "heads of 512 + 64", "pages of 128", run)


def experts() -> Iterator[Configuration]:
    ways: dict[str, dict[str, Any]] = {
        "softmax": {}, "renormalised": {"renorm": True}, "sigmoid": {"sigmoid": True, "renorm": True},
        "groups": {"k_group": 4, "groups": 8}, "groups by two, bias": {"k_group": 4, "groups": 8, "two_of_group": True, "sigmoid": True, "renorm": True},
    }  # fmt: skip
    for dtype, count in itertools.product(DTYPES, (16, 128, 256, moe.MOST_EXPERTS)):
        if dtype == "float16" and count != moe.MOST_EXPERTS:
            continue  # the buffers of bfloat16
        x = empty(64, count, dtype=dtype)
        for variant, way in ways.items():
            given = way | ({"bias": empty(count, dtype="float32")} if "bias" in variant else {})
            run: Callable[[], Any] = lambda x=x, g=given: IMPLEMENTATIONS["moe_gate"](x, 8, **g)
            yield Configuration("moe_gate", dtype, f"{count} experts", variant, run)
    most = moe.COMBINE_COLUMNS
    for dtype in DTYPES:
        for variant, weights in {"": dtype, "float32 weights": "float32"}.items():
            parts = empty(64, most, dtype=dtype), torch.zeros(64, dtype=torch.int32), empty(8, 8, dtype=weights)
            run = lambda p=parts: IMPLEMENTATIONS["moe_combine"](*p)
            if variant != "float32 weights" or dtype != "float32":
                yield Configuration("moe_combine", dtype, f"{most} columns", variant, run)


def latent_keys() -> Iterator[Configuration]:
    pages, slots = (9, 128), torch.zeros(64, dtype=torch.int64)
    for dtype, width in itertools.product(DTYPES, WIDTHS):
        rotated = max(2, width)
        given = (
            empty(64, width + rotated, dtype=dtype), empty(width, dtype=dtype), *(empty(64, rotated, dtype=dtype) for _ in range(2)), slots,
            *(empty(*pages, n, dtype=dtype) for n in (rotated, width)),
        )  # fmt: skip
        run = lambda g=given: IMPLEMENTATIONS["latent_key"](*g, 1e-6)
        yield Configuration("latent_key", dtype, f"{WIDTHS[0]} to {WIDTHS[-1]} elements", str(width), run)


def launches() -> dict[tuple[str, str, str, str], lowering.Launch]:
    """(operator, dtype, tile, variant) -> the one kernel that it launches."""
    found = {}
    before, launch.HOST = launch.HOST, "npu"
    try:
        for c in itertools.chain(products(), row_kernels(), attention(), paged_attention(), latent_keys(), experts()):
            with lowering.captured() as captured:
                c.run()
            (found[c[:4]],) = captured
    finally:
        launch.HOST = before
    return found


def plan(work: tuple[lowering.Launch, str]) -> dict[str, float] | str:
    """What the chip's memory plan uses, or the refusal."""
    module = lowering.lower(*work)
    return module.refusal if module.hivm is None else lowering.memory(module.hivm)


def plans(work: list[tuple[lowering.Launch, str]]) -> list[dict[str, float] | str]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(plan, work))


HEADER = """# Kernels on Ascend

What Huawei's kernel compiler (triton-ascend 3.2.0, bishengir-compile of ascendnpu-ir 1.2.0) makes of every kernel
configuration that an operator can choose, for {chips}. The numbers are the parts of
the unified buffer (UB), of L1 and of the accumulators (L0C) that the compiler's memory plan uses, the largest over the
variants of a line. Generated: `python tests/ascend/configurations.py > docs/reference/ascend-kernels.md`. None of them has run on
a chip; what a closed assembler makes of the HIVM modules is not seen here.

A product's tile is rows x columns x K of one step. Its rows and columns follow the number of rows, K does not, and a
block of K fits whole into L0A and L0B in every tile.

Refused by name: float64, and attention with heads of more than 512 elements (float32: 256; in pages that are not a multiple of 64
keys 128, float32: 64). triton-ascend refuses a launch
of more than 65,535 programs unless TRITON_ALL_BLOCKS_PARALLEL=1 is set.

"""


def document(operators: list[str]) -> str:
    """The page; if operators are named, with the old page's lines of the others."""
    page = Path(__file__).parents[2] / "docs" / "reference" / "ascend-kernels.md"
    old = {
        tuple(line[2:].split(" | ")[:3]): line
        for line in page.read_text().splitlines()
        if operators and line.startswith("| ")
    }
    lines = ["| operator | dtype | tile | variants | " + " | ".join(lowering.CHIPS) + " |", "|---" * 7 + "|"]
    found = launches()
    for name, group in itertools.groupby(found, key=lambda key: key[:3]):
        keys = list(group)
        kept = old.get(name)
        if kept is None or name[0] in operators:
            results = (plans([(found[key], chip) for key in keys]) for chip in lowering.CHIPS.values())
            kept = "| " + " | ".join([*name, ", ".join(key[3] for key in keys), *map(cell, results)]) + " |"
        lines.append(kept)
    chips = ", ".join(f"{chip} ({name})" for name, chip in lowering.CHIPS.items())
    return HEADER.format(chips=chips) + "\n".join(lines) + "\n"


def cell(results: list[dict[str, float] | str]) -> str:
    refused = [r for r in results if isinstance(r, str)]
    if refused:
        return f"{len(refused)} of {len(results)} refused: {refused[0]}"
    most = {m: max(r[m] for r in results if not isinstance(r, str)) for m in NAMES}
    return "fits: " + ", ".join(f"{NAMES[m]} {100 * part:.0f} %" for m, part in most.items() if part)


if __name__ == "__main__":
    print(document(sys.argv[1:]), end="")
