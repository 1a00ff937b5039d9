"""vLLM on CUDA, as far as it can be tested without one; `attention_on_cuda.py` compares bits on a device."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode

from bi_compile import HostError
from bi_compile.vllm import cuda_attention as cuda


def calls(module: str, names: tuple[str, ...]) -> list[ast.Call]:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    return [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names
    ]


@pytest.mark.parametrize("module", cuda.PINNED)
def test_vllm_says_the_lengths_by_keyword(module: str) -> None:
    """Each call in the installed vLLM's backends but those that hand everything on."""
    found = [
        {k.arg for k in call.keywords} for call in calls(module, cuda.PINNED[module]) if {k.arg for k in call.keywords} != {None}
    ]  # fmt: skip
    assert found and all({"max_seqlen_q", "max_seqlen_k"} <= keywords for keywords in found)


def said(**arguments: Any) -> dict[str, Any]:
    return cuda.pinned(lambda **given: given)(max_seqlen_q=7, max_seqlen_k=300, **arguments)  # type: ignore[no-any-return]


def flash(size: int, dtype: torch.dtype = torch.bfloat16, pages: bool = True) -> dict[str, Any]:
    q, k = torch.empty(3, 2, size, dtype=torch.bfloat16), torch.empty(4, 16, 2, size, dtype=dtype)
    return {"q": q, "k": k, "block_table": torch.zeros(1, 4) if pages else None, "fa_version": 3, "num_splits": 0}


def schedule(size: int, dtype: torch.dtype = torch.bfloat16, page: int | None = 16) -> dict[str, Any]:
    return {"headdim": size, "qkv_dtype": dtype, "page_size": page, "num_splits": 4}


@pytest.mark.parametrize("arguments", [flash, schedule])
def test_attention_is_told_one_length_and_one_part(arguments: Any) -> None:
    for size in (64, 96, 256):
        given = said(**arguments(size))
        assert (given["max_seqlen_q"], given["max_seqlen_k"], given["num_splits"]) == (cuda.LONGEST, cuda.LONGEST, 1)
    given = said(**arguments(128))
    assert (given["max_seqlen_q"], given["max_seqlen_k"], given["num_splits"]) == (7, cuda.LONGEST, 1)
    assert said(**arguments(128, torch.float8_e4m3fn))["max_seqlen_q"] == cuda.LONGEST


def test_keys_that_lie_in_no_pages_and_vllms_triton_attention_are_told_one_length() -> None:
    for arguments in (flash(128, pages=False), schedule(128, page=None), {"q": torch.empty(3, 2, 128)}):
        assert said(**arguments)["max_seqlen_q"] == cuda.LONGEST
    assert "num_splits" not in said(q=torch.empty(3, 2, 128))


def test_more_keys_than_that_are_refused() -> None:
    with pytest.raises(HostError, match=f"keeps the order of its sums up to {cuda.LONGEST}, set max_model_len"):
        cuda.pinned(lambda **given: given)(max_seqlen_q=1, max_seqlen_k=cuda.LONGEST + 1)


@pytest.mark.parametrize(
    "cascade, ranks, words", [(False, 1, "remove that line"), (True, 2, "keys lie on several ranks")]
)
def test_settings_that_cut_the_keys_are_refused(cascade: bool, ranks: int, words: str) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(disable_cascade_attn=cascade, is_moe=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=ranks),
    )
    with pytest.raises(HostError, match=words):
        cuda.before_config(config)


def chosen(backend: Any = None, page: int | None = None, keys: str = "auto", **model: Any) -> Any:
    """The name of the backend that an engine gets, and how many keys a page has."""
    asked = {"size": 64, "window": None, "use_mla": False, "dtype": torch.bfloat16, "cap": None, **model}
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            disable_cascade_attn=True, is_hybrid=False, get_head_size=lambda: asked["size"], get_sliding_window=lambda: asked["window"],
            hf_text_config=SimpleNamespace(attn_logit_softcapping=asked["cap"]), **asked,
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        attention_config=SimpleNamespace(backend=backend),
        cache_config=SimpleNamespace(block_size=page or 16, user_specified_block_size=page is not None, cache_dtype=keys),
    )  # fmt: skip
    cuda.before_config(config)
    return getattr(config.attention_config.backend, "name", None), config.cache_config.block_size


def test_our_kernel_is_chosen_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backend

    def capability(major: int) -> None:
        of = SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=major))
        monkeypatch.setattr(cuda, "current_platform", of)

    ours, vllms = ("TRITON_ATTN", 64), (None, 16)
    capability(9)
    assert chosen() == chosen(size=128, dtype=torch.float16, keys="bfloat16") == chosen(Backend.TRITON_ATTN) == ours
    for other in ({"size": 192}, {"dtype": torch.float32}, {"keys": "fp8"}, {"cap": 50.0}):
        assert chosen(**other) == vllms, other
        assert chosen(**other, window=99) == ours, "FlashAttention 3 with a window would be refused"
    assert chosen(page=32) == ("TRITON_ATTN", 32)
    assert chosen(Backend.FLASH_ATTN) == chosen(Backend.FLASH_ATTN, window=99) == ("FLASH_ATTN", 16)
    # vLLM's Triton backend has neither
    assert chosen(size=16) == chosen(window=99, size=16) == chosen(use_mla=True) == vllms
    capability(8)
    assert chosen(size=192) == ours


def asked(dtype: torch.dtype = torch.bfloat16, **more: Any) -> dict[str, Any]:
    """What vLLM's Triton backend says for a layer: every keyword of the installed version that is not given here is None."""
    (call,) = (c for c in calls(cuda.TRITON, ("unified_attention",)) if {k.arg for k in c.keywords} != {None})
    q, k = torch.empty(3, 4, 64, dtype=torch.bfloat16), torch.empty(5, 16, 2, 64, dtype=dtype)
    usual = {
        "q": q,
        "k": k,
        "causal": True,
        "softcap": 0,
        "use_alibi_sqrt": False,
        "chunk_lookback": -1,
        "kv_quant_mode": 0,
    }
    return {**{str(keyword.arg): None for keyword in call.keywords}, "k_descale": torch.ones(()), **usual, **more}


def test_a_layer_gets_our_kernel_or_vllms_by_what_it_asks() -> None:
    from vllm.v1.kv_cache_interface import KVQuantMode

    assert cuda.is_ours(asked()) and cuda.is_ours(asked(kv_quant_mode=KVQuantMode.NONE))
    wanted: dict[str, Any] = {
        "softcap": 30.0, "sinks": torch.zeros(4), "alibi_slopes": torch.zeros(4), "use_alibi_sqrt": True, "causal": False,
        "chunk_lookback": 2, "output_scale": torch.ones(()), "q_descale": torch.ones(()), "what vLLM may add": True,
        "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR,
    }  # fmt: skip
    for name, value in wanted.items():
        assert not cuda.is_ours(asked(**{name: value})), name
    assert not cuda.is_ours(asked(torch.float8_e4m3fn))


def test_the_longest_request_is_told_unless_one_graph_serves_prompts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """cudagraph_mode FULL captures a batch of one token each and replays it for any."""
    told: list[int] = []
    monkeypatch.setattr(cuda.cuda, "fill_paged", lambda: lambda *args: told.append(args[10]))
    monkeypatch.setattr(cuda, "_one_graph_for_all", False)
    attention = cuda.ours(lambda **call: None)
    for mode in (
        None,
        CUDAGraphMode.PIECEWISE,
        CUDAGraphMode.FULL_DECODE_ONLY,
        CUDAGraphMode.FULL,
        CUDAGraphMode.PIECEWISE,
    ):
        check(layer("triton_attn", "TritonAttentionImpl"), mode)
        attention(
            **asked(out=torch.empty(3, 4, 64), cu_seqlens_q=torch.tensor([0, 3]), window_size=(-1, -1), max_seqlen_q=3)
        )
    assert told == [3, 3, 3, 0, 0]


def test_what_follows_the_batch_is_refused() -> None:
    attention = cuda.ours(lambda **call: None)
    attention(**asked(softcap=30.0))
    with pytest.raises(HostError, match=r"unified_attention\(mm_prefix_range=…\) follows the batch"):
        attention(**asked(mm_prefix_range=torch.zeros(1, 1, 2)))


def layer(module: str | None, name: str, **attributes: object) -> Any:
    """A layer of vLLM's with an implementation of attention that is not made: that needs a device."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    kind = type("Layer", (AttentionLayerBase,), {"get_attn_backend": None, "get_kv_cache_spec": None})
    made = kind()
    if module is not None:
        cls = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), name)
        made.impl = object.__new__(cls)
        made.impl.__dict__.update({"attn_type": "decoder", "sliding_window": (-1, -1), **attributes})
    return made


def check(made: Any, mode: CUDAGraphMode | None = CUDAGraphMode.FULL_AND_PIECEWISE) -> None:
    layers = {"model.layers.0.attn": made, "model.layers.0.mlp.experts": object()}
    compilation = SimpleNamespace(static_forward_context=layers, cudagraph_mode=mode)
    cuda.check_model(SimpleNamespace(compilation_config=compilation, model_config=None))


def test_the_attention_that_was_tried_is_accepted() -> None:
    check(layer("flash_attn", "FlashAttentionImpl", vllm_flash_attn_version=3))
    check(layer("triton_attn", "TritonAttentionImpl", sliding_window=(99, 0)))


@pytest.mark.parametrize(
    "made, words",
    [
        (("flash_attn", "FlashAttentionImpl", {"vllm_flash_attn_version": 2}), "FlashAttention 2, .*TRITON_ATTN"),
        (
            ("flash_attn", "FlashAttentionImpl", {"vllm_flash_attn_version": 3, "sliding_window": (99, 0)}),
            "a window of 100 keys.*TRITON_ATTN",
        ),
        (("triton_attn", "TritonAttentionImpl", {"attn_type": "encoder_only"}), "'encoder_only', which was not tried"),
        (("flex_attention", "FlexAttentionImpl", {}), "FlexAttentionImpl for attention.*TRITON_ATTN"),
        ((None, "", {}), "NoneType for attention, which vLLM calls between the compiled graphs"),
    ],
)
def test_other_attention_is_refused_with_its_place(made: Any, words: str) -> None:
    module, name, attributes = made
    with pytest.raises(HostError, match=rf"(?s)^model\.layers\.0\.attn .*{words}"):
        check(layer(module, name, **attributes))
