"""A vLLM in which what is hooked has another name: without the key it runs, and with the key a sentence says what is missing."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import python
from vllm_names import absent

#: what a newer vLLM may call otherwise -> (how its source is changed, what the sentence names)
RENAMED = {
    "config": (
        [
            (r"(?m)^@config\b", "@settings"),
            (r"(?m)^def config\(", "def settings("),
            (r"(?m)^    config,$", "    settings,"),
            (r"((?:vllm\.config|)\.utils import .*)\bconfig\b", r"\1settings"),
        ],
        "vllm.config.utils.config",
    ),
    "WorkerWrapperBase": (
        [(r"\bWorkerWrapperBase\b", "WorkerShell")],
        "vllm.v1.worker.worker_base.WorkerWrapperBase.init_worker",
    ),
}
PROGRAM = """
import importlib.abc, importlib.machinery, re, sys

class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        source = changed = self.get_source(name)
        for pattern, replacement in {changes!r}:
            changed = re.sub(pattern, replacement, changed)
        return super().get_code(name) if changed == source else compile(changed, self.path, "exec")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if not name.startswith(("vllm.config", "vllm.v1", "vllm.engine", "vllm.executor")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(name, spec.origin)
        return spec

sys.meta_path.insert(0, Finder())
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
arguments = dict(model={model!r}, skip_tokenizer_init=True, max_model_len=256)
print("SAID", type(EngineArgs(**arguments).create_engine_config()).__name__)
try:
    LLM(**arguments, compilation_config={{"custom_passes": ["bi_ascend"]}})
except Exception as error:
    print("SAID", error)
"""


@pytest.mark.parametrize("what", RENAMED)
def test_a_renamed_hook_harms_nobody_without_the_key(model: Callable[[str], Path], what: str) -> None:
    changes, missing = RENAMED[what]
    done = python(["-c", textwrap.dedent(PROGRAM.format(changes=changes, model=str(model("llama"))))])
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert said[0] == "SAID VllmConfig", done.stdout[-4000:]
    sentence = f"this vLLM does not have {missing}"
    remedy = "which bi_compile hooks: custom_passes cannot be used with it"
    answer = done.stdout.rpartition(said[0])[2]
    assert len(said) == 2 and sentence in answer and remedy in answer, done.stdout[-4000:]


def test_the_installed_vllm_has_every_name() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    assert absent(Path(spec.submodule_search_locations[0])) == []
