"""`bi-compile audit --target`: three models of transformers, from their configurations alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
from transformers import BertConfig

from bi_compile import OptionError, RewriteError, offline

ENCODER = BertConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    vocab_size=512,
    architectures=["BertModel"],
)


@pytest.mark.parametrize("model", ["dense", "encoder"])
def test_the_audit_says_what_varies_what_is_replaced_and_what_is_left(model: str, tmp_path: Path) -> None:
    (ENCODER if model == "encoder" else support.CONFIGS[model]).save_pretrained(tmp_path)
    found = offline.run(tmp_path, "ascend-a2", print)
    print(model, found.varies, found.replaced, sorted({f.operator for f in found.left}))
    assert sum(found.replaced.values()) > 0
    # a product or a norm never stays; what does is named with what would be needed
    assert not {f.operator for f in found.left} & {"aten.matmul.default", "aten.linear.default", "aten.mean.dim"}
    assert all(f.reason for f in found.left)


def test_a_mixture_of_experts_is_refused_by_the_name_of_its_product(tmp_path: Path) -> None:
    """transformers writes the experts as one grouped product, which has no invariant form in a graph."""
    support.CONFIGS["moe"].save_pretrained(tmp_path)
    with pytest.raises(
        RewriteError, match=r"aten\._grouped_mm\.default.*no invariant kernel for scaled .* and grouped products"
    ):
        offline.run(tmp_path, "ascend-a2", print)


def test_a_folder_without_a_model_and_a_target_without_an_npu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds no config"):
        offline.run(tmp_path, "ascend-a2", print)
    with pytest.raises(OptionError, match="known are ascend-a2"):
        offline.run(tmp_path, "cuda", print)
