"""The real vllm-ascend engine on the emulated NPU (`emulated_npu.py`), whose untrusted operators vary with the batch."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from npu_layers import CONFIGS

SERVE = Path(__file__).with_name("serve.py")
PASS = {"custom_passes": ["bi_ascend"]}
#: patterns that vllm-ascend would trace on tensors of the device; that device has no quantisation
PATTERNS = {"fuse_norm_quant": False, "fuse_qknorm_rope": False, "fuse_muls_add": False}
PIECEWISE: dict[str, Any] = {
    "compilation_config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [16]},
    "additional_config": {"ascend_compilation_config": {"enable_npugraph_ex": False, **PATTERNS}},
}


def make_models(folder: Path) -> dict[str, Path]:
    """Qwen3 and Qwen3-MoE of two layers with random weights."""
    import transformers

    folders = {}
    for kind in ("dense", "moe"):
        folders[kind] = folder / kind
        config = copy.deepcopy(CONFIGS[kind])
        config.initializer_range = 0.1
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def printed(script: Path, model: Path, cache: Path, arguments: dict[str, Any], **environment: str) -> tuple[str, str]:
    """(the last line that the script printed, everything that it printed)."""
    path = [str(Path(sys.prefix) / "vision"), environment.pop("PYTHONPATH", os.environ.get("PYTHONPATH"))]
    variables = {
        "VLLM_PLUGINS": "ascend,bi_compile", "TRITON_INTERPRET": "1", "VLLM_CACHE_ROOT": str(cache),
        "HCCL_DETERMINISTIC": "strict", "LCCL_DETERMINISTIC": "1",
        "OMP_NUM_THREADS": "1",  # two of these processes run side by side
        # torchvision, which vllm-ascend imports, lies apart (Makefile)
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        # vllm-ascend was made for torch 2.10; its vllm::maybe_pad_and_reduce returns its argument, which a newer torch forbids
        # where CI is set
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0", "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(model), json.dumps(arguments)],
        env=os.environ | variables | environment, capture_output=True, text=True, check=False, timeout=540,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return done.stdout.strip().splitlines()[-1], said


def serve(model: Path, cache: Path, arguments: dict[str, Any], **environment: str) -> tuple[int, str]:
    """(requests that differ, everything that was printed)."""
    last, said = printed(SERVE, model, cache, arguments, **environment)
    return json.loads(last)["differ"], said


def through(mode: str) -> dict[str, Any]:
    """With the pass: PIECEWISE compiles through vllm-ascend's pass manager, FULL_DECODE_ONLY through npugraph_ex."""
    compiler = {"ascend_compilation_config": {"enable_npugraph_ex": mode != "PIECEWISE", **PATTERNS}}
    compilation = PIECEWISE["compilation_config"] | PASS | {"cudagraph_mode": mode}
    return {"compilation_config": compilation, "additional_config": compiler}


#: case -> arguments of the engine, environment
WITHOUT: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": (PIECEWISE, {}),
    "VLLM_BATCH_INVARIANT": (PIECEWISE, {"VLLM_BATCH_INVARIANT": "1"}),
}
WITH: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "pass manager": (through("PIECEWISE"), {}),
    "npugraph_ex": (through("FULL_DECODE_ONLY"), {}),
    "eager fallback alone": (PIECEWISE | {"enforce_eager": True, "compilation_config": PASS}, {}),
}
KINDS = ("dense", "moe")


@pytest.fixture(scope="module")
def served(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[str, str], tuple[int, str]]]:
    """The result of a case for a kind of model; two engines run at a time, those of the tests that were chosen, in their order."""
    chosen = [i.callspec.params for i in request.session.items if getattr(i, "module", None) is request.module]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = {}
        for kind, case in ((c["kind"], c["case"]) for c in chosen):
            arguments, environment = (WITHOUT | WITH)[case]
            results[kind, case] = pool.submit(
                serve, models[kind], tmp_path_factory.mktemp(kind), arguments, **environment
            )
        yield lambda kind, case: results[kind, case].result()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WITHOUT)
def test_without_the_pass_requests_differ(served: Callable[[str, str], tuple[int, str]], kind: str, case: str) -> None:
    """Also with vllm-ascend's own mode: it finds no kernels, says so in its log and serves."""
    differ, said = served(kind, case)
    assert differ > 0
    assert ("skipping batch-invariant initialization" in said) == (case == "VLLM_BATCH_INVARIANT")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WITH)
def test_with_the_pass_none_differs(served: Callable[[str, str], tuple[int, str]], kind: str, case: str) -> None:
    assert served(kind, case)[0] == 0
