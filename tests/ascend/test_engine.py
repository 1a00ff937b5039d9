"""The real vllm-ascend engine on the emulated NPU (`emulated_npu.py`), whose untrusted operators vary with the batch."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CONFIGS

SERVE = Path(__file__).with_name("serve.py")
PASS = {"custom_passes": ["bi_ascend"]}
#: patterns that vllm-ascend would trace on tensors of the device; that device has no quantisation
PATTERNS = {"fuse_norm_quant": False, "fuse_qknorm_rope": False, "fuse_muls_add": False}
PIECEWISE: dict[str, Any] = {
    "compilation_config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [16]},
    "additional_config": {"ascend_compilation_config": {"enable_npugraph_ex": False, **PATTERNS}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen3 and Qwen3-MoE of two layers with random weights."""
    import transformers

    folders = {}
    for kind in ("dense", "moe"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = copy.deepcopy(CONFIGS[kind])
        config.initializer_range = 0.1
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folders[kind])
    return folders


def serve(model: Path, cache: Path, arguments: dict[str, Any], **environment: str) -> tuple[int, str]:
    """(requests that differ, everything that was printed)."""
    variables = {
        "VLLM_PLUGINS": "ascend,bi_compile", "TRITON_INTERPRET": "1", "VLLM_CACHE_ROOT": str(cache),
        "HCCL_DETERMINISTIC": "strict", "LCCL_DETERMINISTIC": "1",
        "OMP_NUM_THREADS": "1",  # two of these processes run side by side
        # torchvision, which vllm-ascend imports, lies apart (Makefile)
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(sys.prefix) / "vision"), os.environ.get("PYTHONPATH")])),
        # vllm-ascend was made for torch 2.10; its vllm::maybe_pad_and_reduce returns its argument, which a newer torch forbids
        # where CI is set
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0", "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SERVE), str(model), json.dumps(arguments)],
        env=os.environ | variables | environment, capture_output=True, text=True, check=False, timeout=540,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])["differ"], said


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("own", ["0", "1"])
def test_without_the_pass_requests_differ(models: dict[str, Path], tmp_path: Path, kind: str, own: str) -> None:
    """With vllm-ascend's own mode switched on: it finds no kernels, says so in its log and serves."""
    differ, said = serve(models[kind], tmp_path, PIECEWISE, VLLM_BATCH_INVARIANT=own)
    assert differ > 0
    assert ("skipping batch-invariant initialization" in said) == (own == "1")


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_DECODE_ONLY"])
def test_with_the_pass_none_differs(models: dict[str, Path], tmp_path: Path, kind: str, mode: str) -> None:
    """PIECEWISE compiles through vllm-ascend's pass manager, FULL_DECODE_ONLY through npugraph_ex."""
    compilation = PIECEWISE["compilation_config"] | PASS | {"cudagraph_mode": mode}
    through = {"ascend_compilation_config": {"enable_npugraph_ex": mode != "PIECEWISE", **PATTERNS}}
    arguments = {"compilation_config": compilation, "additional_config": through}
    assert serve(models[kind], tmp_path, arguments)[0] == 0


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_with_the_eager_fallback_alone_none_differs(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    arguments = {"enforce_eager": True, "compilation_config": PASS}
    assert serve(models[kind], tmp_path, PIECEWISE | arguments)[0] == 0
