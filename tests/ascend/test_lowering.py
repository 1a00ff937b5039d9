"""Ascend's own kernel compiler takes every kernel that an operator can choose; the number of rows reaches none of them.

docs/reference/ascend-kernels.md has every configuration on every chip. Lowering them all takes many minutes, so the tests compare the
list and lower a sample: the last variant of each line on A2, and every fourth of these on the others.
"""

from __future__ import annotations

import re
from pathlib import Path

import configurations
import lowering
import pytest
import torch

from bi_compile.kernels.ascend import triton_kernels
from bi_compile.kernels.triton import launch, tiles

IMPLEMENTATIONS = triton_kernels()
DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "ascend-kernels.md"
LAUNCHES = configurations.launches()
#: the last variant, for row kernels the widest, of each operator, dtype and tile
LAST = list({key[:3]: key for key in LAUNCHES}.values())


def documented() -> dict[tuple[str, ...], list[str]]:
    """(operator, dtype, tile) -> variants and the cells of the chips."""
    rows = [line.strip("|\n ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.count(" | ") == 6]
    return {tuple(cell.strip() for cell in row[:3]): [cell.strip() for cell in row[3:]] for row in rows[1:]}


def test_the_document_lists_every_configuration() -> None:
    expected: dict[tuple[str, ...], list[str]] = {}
    for key in LAUNCHES:
        expected.setdefault(key[:3], []).append(key[3])
    assert {name: cells[0] for name, cells in documented().items()} == {k: ", ".join(v) for k, v in expected.items()}


def test_the_document_has_no_refusal() -> None:
    assert all(cell.startswith("fits: ") for cells in documented().values() for cell in cells[1:])


@pytest.mark.parametrize(("generation", "step"), [("A2", 2), ("A3", 8), ("950", 8)])
def test_a_sample_fits(generation: str, step: int) -> None:
    """No more of a memory than the document says, which has the most of all variants of a line."""
    sample, column = LAST[::step], list(lowering.CHIPS).index(generation) + 1
    results = configurations.plans([(LAUNCHES[key], lowering.CHIPS[generation]) for key in sample])
    table = documented()
    for key, result in zip(sample, results, strict=True):
        assert not isinstance(result, str), (key, result)
        allowed = {name: int(part) for name, part in re.findall(r"(\w+) (\d+) %", table[key[:3]][column])}
        for memory, part in result.items():
            assert 100 * part <= allowed.get(configurations.NAMES[memory], 0) + 0.5, (key, memory, part)


def test_a_tile_that_does_not_fit_is_refused() -> None:
    """The compiler does judge: an accumulator of 256 x 256 is twice L0C."""
    from bi_compile.kernels.triton.matmul import product

    a, b = torch.empty(1, 256, 512), torch.empty(1, 512, 256)
    with pytest.MonkeyPatch.context() as patch, lowering.captured() as found:
        patch.setattr(launch, "HOST", "npu")
        product(a.new_empty(1, 256, 256), a, b, tile=tiles.Tile(256, 256, 1, 1))
    assert "cc overflow" in lowering.lower(found[0], lowering.CHIPS["A2"]).said


def kernels_over_rows(name: str, rows: int, dtype: torch.dtype) -> list[str]:
    """Names and cache keys of the kernels that the operator launches for that many rows."""
    x, w = torch.empty(rows, 1024, dtype=dtype), torch.empty(1024, dtype=dtype)
    calls = {
        "mm": lambda f: f(x, torch.empty(512, 1024, dtype=dtype).t()),
        "mm_segments": lambda f: f(x, torch.empty(512, 1024, dtype=dtype).t(), 4),
        "addmm": lambda f: f(torch.empty(1, 512, dtype=dtype), x, torch.empty(1024, 512, dtype=dtype), alpha=2),
        "grouped_mm": lambda f: f(x, torch.empty(4, 1024, 512, dtype=dtype), torch.tensor([0, rows // 2, rows, rows])),
        "sum": lambda f: f(x, [1]), "mean": lambda f: f(x, [1]), "var_mean": lambda f: f(x, [1]),
        "logsumexp": lambda f: f(x, [1]), "softmax": lambda f: f(x, 1), "log_softmax": lambda f: f(x, 1),
        "cumsum": lambda f: f(x, 1), "rms_norm": lambda f: f(x, w, 1e-6), "add_rms_norm": lambda f: f(x, x, w, 1e-6),
        "layer_norm": lambda f: f(x, w, w, 1e-5), "group_norm": lambda f: f(x[:, :, None], w, w, 4, 1e-5),
        "bmm_transposed": lambda f: f(x.view(rows, 2, 512).transpose(0, 1), torch.empty(2, 512, 128, dtype=dtype)),
        "latent_key": lambda f: f(
            x, w[:960], x[:, :64], x[:, :64], torch.zeros(rows, dtype=torch.int64),
            *(torch.empty(9, 128, n, dtype=dtype) for n in (64, 960)), 1e-6,
        ),
        "moe_gate": lambda f: f(x, 8, k_group=4, groups=8, renorm=True),
        "moe_combine": lambda f: f(x, torch.zeros(8 * rows, dtype=torch.int32), torch.empty(rows, 8, dtype=dtype)),
        "scaled_dot_product_attention": lambda f: f(
            x.view(1, rows, 8, 128).transpose(1, 2), *[torch.empty(1, 2, 300, 128, dtype=dtype)] * 2
        ),
        "paged_attention": lambda f: f(
            x.view(rows, 8, 128), *[torch.empty(9, 128, 2, 128, dtype=dtype)] * 2,
            torch.zeros(2, rows, dtype=torch.int32), torch.zeros(rows, 1 + rows // 7, dtype=torch.int32), right=0,
        ),
    }  # fmt: skip
    with lowering.captured() as found:
        calls[name](IMPLEMENTATIONS[name])
    return [f"{kernel.name} {kernel.key}" for kernel in found]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
# qk_norm is two norms there
@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS.keys() - {"bmm", "baddbmm", "qk_norm"}))
def test_the_number_of_rows_reaches_no_constant(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One module for all numbers of rows; of a product, one for each tile in the table."""
    monkeypatch.setattr(launch, "HOST", "npu")
    products = ("mm", "mm_segments", "addmm", "bmm_transposed", "grouped_mm")
    table = tiles.PRODUCT["npu"][dtype.itemsize] if name in products else [(1, None)]
    found = {key for rows in (*range(1, 258), 512, 1024, 4095) for key in kernels_over_rows(name, rows, dtype)}
    assert len(found) == len(table), found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tile_of_a_product_takes_k_in_the_same_steps(dtype: str) -> None:
    """In the code handed to bishengir-compile: one matrix product in one ascending loop, its K that of the table. A block
    fits whole, and twice, into L0A and L0B, so that nothing there cuts it by the tile's height."""
    block = tiles.PRODUCT_K["npu"][configurations.DTYPES[dtype].itemsize]
    for (operator, d, name, variant), kernel in LAUNCHES.items():
        if operator not in ("mm", "addmm", "grouped_mm") or d != dtype:
            continue
        height, width = map(int, name.split(" x ")[:2])
        linalg = kernel.linalg(lowering.CHIPS["A2"])
        dots = re.findall(r"linalg.matmul.*ins\(.*: tensor<(\d+)x(\d+)x\w+>, tensor<(\d+)x(\d+)x\w+>\)", linalg)
        assert dots == [(str(height), str(block), str(block), str(width))], (operator, name, variant)
        assert 2 * block * max(height, width) * configurations.DTYPES[dtype].itemsize <= 2**16
