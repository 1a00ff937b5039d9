"""The engine's configuration with the real NPUPlatform, and what is refused before a model loads."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import npu_layers
import pytest
import torch

from bi_compile import HostError
from bi_compile.vllm.ascend import AscendPass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return npu_layers.model_folder("dense", tmp_path_factory.mktemp("model"))


def test_the_configuration_holds_the_pass_its_settings_and_a_stable_hash(model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    def make() -> Any:
        return EngineArgs(
            model=model, skip_tokenizer_init=True, compilation_config={"custom_passes": ["bi_ascend"]}
        ).create_engine_config()

    config = make()
    assert type(current_platform).__name__ == "NPUPlatform"
    assert config.compilation_config.oot_compiler.endswith("AscendCompiler")
    ours = config.compilation_config.inductor_compile_config["graph_fusion_manager"]
    assert isinstance(ours, AscendPass) and ours.pipeline.options.target == "ascend-a2"
    assert config.compilation_config.cudagraph_mode.name == "PIECEWISE"
    assert config.additional_config["weight_nz_mode"] == 0
    assert config.additional_config["enable_matmul_allreduce"] is False
    assert config.additional_config["ascend_compilation_config"]["fuse_allreduce_rms"] is False
    assert config.compute_hash() == make().compute_hash()


def test_the_options_of_additional_config_are_read_and_change_the_hash(model: str) -> None:
    plain = npu_layers.engine_config(model)
    warn = npu_layers.engine_config(model, additional_config={"bi_compile": {"on_unproven": "warn"}})
    ours = warn.compilation_config.inductor_compile_config["graph_fusion_manager"]
    assert ours.pipeline.options.on_unproven == "warn"
    assert plain.compute_hash() != warn.compute_hash()


@pytest.mark.parametrize(
    "additional, line",
    [
        ({"weight_nz_mode": 2}, "write weight_nz_mode=0"),
        ({"enable_matmul_allreduce": True}, "write enable_matmul_allreduce=False"),
        ({"ascend_compilation_config": {"fuse_allreduce_rms": True}}, "write fuse_allreduce_rms=False"),
        ({"enable_flashcomm1": True}, "sequence parallelism .* write enable_flashcomm1=False"),
    ],
)
def test_a_setting_that_breaks_the_guarantee_is_refused_with_the_line_to_write(
    additional: dict[str, Any], line: str, model: str
) -> None:
    with pytest.raises(HostError, match=line):
        npu_layers.engine_config(model, additional_config=additional)


def test_ranks_that_share_experts_or_a_sequence_are_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"npu_moe_distribute_dispatch.*write enable_expert_parallel=False"):
        npu_layers.engine_config(model, enable_expert_parallel=True, tensor_parallel_size=2)
    with pytest.raises(HostError, match="enable_sp=True: sequence parallelism"):
        npu_layers.engine_config(model, compilation_config={"pass_config": {"enable_sp": True}})
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_FLASHCOMM1", "1")
    with pytest.raises(HostError, match="VLLM_ASCEND_ENABLE_FLASHCOMM1=1 is set"):
        npu_layers.engine_config(model)


def test_hccl_true_is_not_enough(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_DETERMINISTIC", "true")
    with pytest.raises(HostError, match="set HCCL_DETERMINISTIC=strict or unset it"):
        npu_layers.engine_config(model)


def test_without_kernels_the_engine_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bi_compile.targets import ascend

    real = ascend.importlib.util.find_spec
    monkeypatch.setattr(ascend.importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    with pytest.raises(HostError, match="pip install triton-ascend"):
        npu_layers.engine_config(model)


def test_vllm_ascends_own_mode_patches_nothing_while_ours_is_active() -> None:
    """It keeps its settings, so VLLM_BATCH_INVARIANT=1 may be set or not."""
    import vllm_ascend.batch_invariant as own

    from bi_compile.vllm.ascend import own_mode_off

    before = own.enable_batch_invariant_mode
    with own_mode_off():
        own.enable_batch_invariant_mode()
        assert own._batch_invariant_LIB is None
    assert own.enable_batch_invariant_mode is before


def test_a_package_without_the_operator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is nobody's here: an empty one stands in for an old release."""
    from bi_compile.kernels.ascend.ascendc import ascendc_operators

    (tmp_path / "batch_invariant_ops.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "batch_invariant_ops", None)  # so that it is taken out again
    monkeypatch.delitem(sys.modules, "batch_invariant_ops")
    with pytest.raises(HostError, match=r"lacks npu_mm_batch_invariant.*install its current release"):
        ascendc_operators()


LATENT = {"fa_quant_layer": False, "enable_kv_nz": False, "enable_mlapo": False}


@pytest.mark.parametrize(
    "module, name, attributes, words",
    [
        ("attention_v1", "AscendAttentionBackendImpl", {}, None),
        ("attention_v1", "AscendC8AttentionBackendImpl", {}, "AscendC8AttentionBackendImpl"),
        ("attention_v1", "AscendAttentionBackendImpl", {"sinks": torch.zeros(4)}, "npu_fused_infer_attention_score_v2"),
        ("attention_v1", "AscendAttentionBackendImpl", {"head_size": 512}, "_npu_paged_attention .heads of 512"),
        ("attention_v1", "AscendAttentionBackendImpl", {"enable_hamming_sparse": True}, "sparse attention"),
        ("mla_v1", "AscendMLAImpl", LATENT, None),
        ("mla_v1", "AscendMLAImpl", LATENT | {"fa_quant_layer": True}, "an 8-bit latent cache"),
        ("mla_v1", "AscendMLAImpl", LATENT | {"enable_kv_nz": True}, "a latent cache in the NZ format"),
        ("mla_v1", "AscendMLAImpl", LATENT | {"enable_mlapo": True}, "mlapo"),
        ("sfa_v1", "AscendSFAImpl", {}, "sparse attention .AscendSFAImpl, as DeepSeek-V3.2 has"),
    ],
)
def test_attention_that_the_table_does_not_have_is_refused(
    module: str, name: str, attributes: dict[str, object], words: str | None, model: str
) -> None:
    """vLLM calls it between the compiled graphs, where no audit sees it."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from bi_compile.vllm.ascend_attention import check_layers

    config = npu_layers.engine_config(model)
    layer = type("Layer", (AttentionLayerBase,), {"get_attn_backend": None, "get_kv_cache_spec": None})()
    layer.impl = object.__new__(getattr(importlib.import_module(f"vllm_ascend.attention.{module}"), name))
    layer.impl.__dict__.update({"head_size": 128, "sinks": None, "enable_hamming_sparse": False, **attributes})
    config.compilation_config.static_forward_context["model.layers.0.attn"] = layer
    refused = (
        pytest.raises(HostError, match=rf"model\.layers\.0\.attn has {words}") if words else contextlib.nullcontext()
    )
    with refused:
        check_layers(config)


def test_sparse_attention_is_refused_before_the_model_loads() -> None:
    from bi_compile.vllm.ascend_attention import check_config

    text = types.SimpleNamespace(index_topk=2048)
    with pytest.raises(HostError, match=r"some/V3.2 has sparse attention \(index_topk, as DeepSeek-V3.2\)"):
        check_config(types.SimpleNamespace(model="some/V3.2", hf_text_config=text))


def test_ascendcs_attention_is_not_captured(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full graph mode with the package `batch_invariant_ops` is refused when the configuration is made; without it, accepted."""
    from bi_compile.kernels.ascend import ascendc

    full = npu_layers.engine_config(model, "FULL_DECODE_ONLY")
    assert full.compilation_config.cudagraph_mode.name == "FULL_DECODE_ONLY"
    monkeypatch.setattr(ascendc, "attention", lambda: object())
    with pytest.raises(HostError, match="cudagraph_mode=FULL_DECODE_ONLY captures attention, and AscendC's"):
        npu_layers.engine_config(model, "FULL_DECODE_ONLY")


def test_a_mixture_of_experts_without_vllm_ascends_operators_is_refused(tmp_path: Path) -> None:
    """They are built in C++, which is not done here; a dense model needs none."""
    from bi_compile.vllm.ascend import load_custom_ops

    for kind in ("dense", "moe"):
        folder = tmp_path / kind
        folder.mkdir()
        config = npu_layers.engine_config(npu_layers.model_folder(kind, folder))
        refused = pytest.raises(HostError, match=r"a mixture of experts needs .*COMPILE_CUSTOM_KERNELS=1")
        with refused if kind == "moe" else contextlib.nullcontext():
            load_custom_ops(config)


@pytest.mark.parametrize("new", [True, False])
def test_a_page_beyond_the_cache_is_a_sentence_before_the_step(new: bool) -> None:
    """Where the scheduler gives it, on the host; the engines of test_engine.py are served with the same check."""
    from bi_compile.vllm.ascend_attention import check_pages

    pages = ([7, 1], [8, 0])
    cached = types.SimpleNamespace(req_ids=["a", "b"], new_block_ids=[None, () if new else pages])
    first = types.SimpleNamespace(req_id="c", block_ids=pages if new else ([7],))
    step = types.SimpleNamespace(scheduled_new_reqs=[first], scheduled_cached_reqs=cached)
    with pytest.raises(ValueError, match=f"request {'c' if new else 'b'} page 8 of a key cache that has 8"):
        check_pages(8, step)
    check_pages(9, step)
