"""The real vllm-ascend engine on the emulated NPU (`emulated_npu.py`), whose untrusted operators vary with the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import npu_models
import pytest

SERVE = Path(__file__).with_name("serve.py")
PASS = {"custom_passes": ["bi_ascend"]}
#: patterns that vllm-ascend would trace on tensors of the device; that device has no quantisation
PATTERNS = {"fuse_norm_quant": False, "fuse_qknorm_rope": False, "fuse_muls_add": False}
PIECEWISE: dict[str, Any] = {
    "compilation_config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [16]},
    "additional_config": {"ascend_compilation_config": {"enable_npugraph_ex": False, **PATTERNS}},
}


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
#: attention and what is between are captured, of prompts too; with latent attention vLLM captures steps that decode alone
FULL: dict[str, tuple[dict[str, Any], dict[str, str]]] = {"FULL": (through("FULL"), {})}
#: one process serves all of them
pytestmark = pytest.mark.xdist_group("engine")
KINDS = ("dense", "moe", "v3", "w8a8")


def variables(path: str | None = None) -> dict[str, str]:
    """The environment of a process that serves; `path`: in place of this one's PYTHONPATH."""
    paths = [str(Path(sys.prefix) / "vision"), os.environ.get("PYTHONPATH") if path is None else path]
    return {
        "VLLM_PLUGINS": "ascend,bi_compile", "TRITON_INTERPRET": "1", "HCCL_DETERMINISTIC": "strict", "LCCL_DETERMINISTIC": "1",
        "OMP_NUM_THREADS": "1",  # two of these processes run side by side
        # torchvision, which vllm-ascend imports, lies apart (Makefile)
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # vllm-ascend was made for torch 2.10; its vllm::maybe_pad_and_reduce returns its argument, which a newer torch forbids
        # where CI is set
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0", "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0",
    }  # fmt: skip


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[str, str], tuple[dict[str, Any], str]]]:
    """What a case found for a kind of model, and what it printed; one process serves all that were chosen."""
    chosen = [i.callspec.params for i in request.session.items if getattr(i, "module", None) is request.module]
    folder, jobs = tmp_path_factory.mktemp("engines"), {}
    models = {kind: npu_models.make(kind, folder / kind) for kind in {c["kind"] for c in chosen}}
    pairs = [(c["kind"], c["case"]) for c in chosen]
    compared = [(kind, "eager fallback alone") for kind, case in pairs if case in ("npugraph_ex", *FULL)]
    for kind, case in dict.fromkeys(pairs + compared):
        arguments, environment = (WITHOUT | WITH | FULL)[case]
        cache = str(tmp_path_factory.mktemp("cache"))
        jobs[f"{kind}, {case}"] = {
            "model": str(models[kind]), "arguments": arguments, "log": str(folder / f"{len(jobs)}.log"),
            "environment": environment | {"VLLM_CACHE_ROOT": cache},
        }  # fmt: skip
    finished: set[str] = set()
    with open(folder / "all.log", "w") as errors, subprocess.Popen(
        [sys.executable, str(SERVE), json.dumps(jobs)], env=os.environ | variables(), stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:  # fmt: skip

        def result(kind: str, case: str) -> tuple[dict[str, Any], str]:
            name = f"{kind}, {case}"
            assert process.stdout is not None
            while name not in finished:
                line = process.stdout.readline()
                assert line, (folder / "all.log").read_text()[-6000:]
                finished.add(line.strip())
            said = Path(jobs[name]["log"]).read_text()
            last = said.strip().splitlines()[-1]
            assert last.startswith(json.dumps({name: 0})[:-3]), said[-6000:]
            return json.loads(last)[name], said

        try:
            yield result
        finally:
            process.kill()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain"])
def test_without_the_pass_requests_differ(served: Any, kind: str, case: str) -> None:
    found, _ = served(kind, case)
    print(f"{kind}: {found['differ']} of {found['of']} differ")
    assert found["differ"] > 0


@pytest.mark.parametrize("kind", ["dense"])
@pytest.mark.parametrize("case", ["VLLM_BATCH_INVARIANT"])
def test_with_vllm_ascends_own_mode_they_differ(served: Any, kind: str, case: str) -> None:
    """It finds no kernels, says so in its log and serves."""
    found, said = served(kind, case)
    assert found["differ"] > 0
    assert "skipping batch-invariant initialization" in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WITH)
def test_with_the_pass_none_differs(served: Any, kind: str, case: str) -> None:
    """Alone, among others, in chunks, and behind a cached prefix; and what a captured graph answers is what eager code answers."""
    found, _ = served(kind, case)
    assert found["differ"] == found["differ behind a cached prefix"] == 0
    captured = case == "npugraph_ex"
    assert (found["graphs"]["captured"] > 0) == (case != "eager fallback alone")
    assert (found["graphs"]["replayed"] > 10) == (case != "eager fallback alone")
    if captured:
        assert found["answers"] == served(kind, "eager fallback alone")[0]["answers"]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("case", FULL)
def test_whole_steps_in_one_graph(served: Any, kind: str, case: str) -> None:
    """What was captured with other lengths answers what eager code answers."""
    found, said = served(kind, case)
    assert "mixed prefill-decode, FULL" in said and found["graphs"]["replayed"] > 10
    assert found["differ"] == found["differ behind a cached prefix"] == 0
    assert found["answers"] == served(kind, "eager fallback alone")[0]["answers"]
