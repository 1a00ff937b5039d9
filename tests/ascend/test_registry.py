"""Every operator that torch_npu registers has exactly one verdict, and the page in docs/ says the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
import torch_npu  # noqa: F401  registers the operators

from bi_compile.cli import npu_reference

ROOT = Path(__file__).parent.parent.parent


def test_every_operator_has_exactly_one_verdict() -> None:
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("npu::")}
    rows = npu_reference.verdicts()
    assert sorted(name for name, *_ in rows) == sorted(registered)
    counts = Counter(verdict for _, verdict, _ in rows)
    print(len(rows), dict(counts))
    assert len(registered) == 425


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "reference" / "npu-operators.md").read_text() == npu_reference.markdown(), (
        "run `make npu-operators`"
    )
