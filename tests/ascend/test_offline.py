"""`bi-compile audit --target`: three models of transformers, from their configurations alone."""

from __future__ import annotations

from pathlib import Path

import audit_models
import npu_layers
import pytest
from browser import needs_browser, read_and_search
from transformers import BertConfig
from typer.testing import CliRunner

from bi_compile import OptionError
from bi_compile.cli import app
from bi_compile.offline import trace as offline

ENCODER = BertConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    vocab_size=512,
    architectures=["BertModel"],
)


@pytest.mark.parametrize("model", ["dense", "moe", "encoder"])
def test_the_audit_says_what_varies_and_what_is_replaced(model: str, tmp_path: Path) -> None:
    (ENCODER if model == "encoder" else npu_layers.CONFIGS[model]).save_pretrained(tmp_path)
    found = offline.run(tmp_path, "ascend-a2", print)
    print(model, found.varies, found.replaced)
    varies = {
        "npu.npu_fusion_attention_v3.default",
        {"encoder": "aten.addmm.default"}.get(model, "aten.matmul.default"),
    }
    assert varies <= set(found.varies) and varies <= set(found.replaced)
    assert ("aten._grouped_mm.default" in found.replaced) == (model == "moe")
    assert not found.left


@pytest.mark.parametrize("model", ["Qwen3-32B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"])
def test_models_as_they_are_published(model: str) -> None:
    """Two layers at their true width; `audit_models.py` by hand takes all of them."""
    found = audit_models.audited(model, layers=2)
    assert {"aten.matmul.default", "npu.npu_fusion_attention_v3.default"} <= set(found.replaced)
    assert not found.left


@needs_browser
def test_the_report_of_an_offline_audit(tmp_path: Path) -> None:
    """In a browser; the graph is that of the command's --dump."""
    npu_layers.CONFIGS["dense"].save_pretrained(tmp_path / "model")
    command = ["audit", str(tmp_path / "model"), "--target", "ascend-a2", "--dump", str(tmp_path / "dump")]
    page = tmp_path / "report.html"
    for arguments in (command, ["report", str(tmp_path / "dump"), "-o", str(page)]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    read_and_search(page, "npu.npu_fusion_attention_v3.default", "bi_compile.", "modeling_qwen3.py")


def test_a_folder_without_a_model_and_a_target_without_an_npu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds no config"):
        offline.run(tmp_path, "ascend-a2", print)
    with pytest.raises(OptionError, match="known are ascend-a2"):
        offline.run(tmp_path, "cuda", print)
