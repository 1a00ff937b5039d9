"""What one decoder layer launches on the device: the table of docs/use/ascend.md.

    LD_LIBRARY_PATH=.venv-ascend/cann .venv-ascend/bin/python tests/ascend/launches.py      # some 15 minutes of a core

For Qwen3 and Qwen3-MoE served by the real vllm-ascend on the emulated NPU, whose counter (`emulated_npu.LAUNCHES`) knows native
operators, copies and Triton kernels by name: everything between the attention of layer 0 and that of layer 1, in steps of 1,
16 and 256 requests. Prints a Markdown table, and for each cell that differs from vllm-ascend's own the names.

    ... tests/ascend/launches.py "moe, ours, eager" "dense, ours, eager"        # these
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parent))

REQUESTS = (1, 16, 256)
#: engine -> its case in test_engine.py
ENGINES = {
    "vllm-ascend alone": "plain", "its batch-invariant mode, with `batch_invariant_ops`": "VLLM_BATCH_INVARIANT",
    "ours, through its pass manager": "pass manager", "ours, through npugraph_ex": "npugraph_ex",
    "ours, eager": "eager fallback alone", "ours, through its pass manager, with `batch_invariant_ops`": "pass manager",
}  # fmt: skip
#: "decode, 16" -> what a layer launched, for each way that was seen
Launches = dict[str, list[dict[str, int]]]


def count_layers() -> Launches:
    """What a layer of each step launches from now on; the first two layers have to be of one kind."""
    import emulated_npu
    from vllm_ascend.attention.attention_v1 import AscendAttentionBackendImpl as Impl

    found: Launches = {}
    plain = Impl.forward
    before: list[Counter[str]] = []

    def forward(
        self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if metadata is not None:
            if ".1." in layer.layer_name:
                ends = metadata.actual_seq_lengths_q
                name = f"{'decode' if ends[-1] == len(ends) else 'prefill'}, {len(ends)}"
                launched = dict(emulated_npu.LAUNCHES - before.pop())
                if launched not in found.setdefault(name, []):
                    found[name].append(launched)
            elif ".0." in layer.layer_name:
                before[:] = [emulated_npu.LAUNCHES.copy()]
        return plain(self, layer, query, key, value, cache, metadata, *args, **kwargs)

    Impl.forward = forward
    return found


def engine(model: str, arguments: dict[str, Any]) -> Launches:
    """What a layer launches when 1, 16 and 256 requests are served."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, skip_tokenizer_init=True, max_model_len=64, max_num_batched_tokens=1024, max_num_seqs=max(REQUESTS),
        dtype="float16", seed=0, enable_prefix_caching=False, gpu_memory_utilization=0.05, **arguments,
    )  # fmt: skip
    found = count_layers()
    for n in REQUESTS:
        prompts = [{"prompt_token_ids": [10 + i, 11, 12][: 2 + i % 2]} for i in range(n)]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, detokenize=False), use_tqdm=False)
    return found


def jobs(folder: Path, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Of serve.py: for each "model, engine" the engine's arguments and environment."""
    import test_engine

    found = {}
    for case in cases:
        kind, name = case.split(", ", 1)
        arguments, environment = (test_engine.WITHOUT | test_engine.WITH)[ENGINES[name]]
        found[case] = {
            "model": str(folder / kind), "arguments": arguments, "log": str(folder / f"{case}.log"),
            "environment": environment | {"VLLM_CACHE_ROOT": str(folder / f"cache of {case}")},
        }  # fmt: skip
    return found


def main(chosen: list[str]) -> None:
    import npu_models
    import test_engine

    cases = chosen or [f"{kind}, {name}" for kind in ("dense", "moe") for name in ENGINES]
    package = str(Path(__file__).parents[1] / "helpers" / "stand_in")
    with tempfile.TemporaryDirectory() as folder:
        for kind in {case.split(", ")[0] for case in cases}:
            npu_models.make(kind, Path(folder, kind))
        # vllm-ascend looks for the package when it is imported
        for path in ("", package):
            some = [case for case in cases if ("`batch_invariant_ops`" in case) == bool(path)]
            paths = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
            environment = os.environ | test_engine.variables(paths)
            if some:
                subprocess.run([sys.executable, __file__, "in", folder, *some], env=environment, check=True)
        results = {}
        for case in cases:
            results |= json.loads(Path(folder, f"{case}.log").read_text().strip().splitlines()[-1])
    print(table({tuple(case.split(", ", 1)): found for case, found in results.items()}))


def table(results: dict[tuple[str, str], Launches]) -> str:
    """A line for each engine; below, what it launches."""
    steps = [f"{phase}, {n}" for phase in ("decode", "prefill") for n in REQUESTS]
    lines = ["| model | engine | " + " | ".join(steps) + " |", "|---" * (2 + len(steps)) + "|"]
    below = []
    for (kind, case), found in results.items():
        cells = [" or ".join(sorted({str(sum(way.values())) for way in found.get(step, [])})) or "-" for step in steps]
        lines.append("| " + " | ".join([kind, case, *cells]) + " |")
        ways = {json.dumps(way, sort_keys=True) for step in steps for way in found.get(step, [])}
        below += [f"{kind}, {case}: {way}" for way in sorted(ways)]
    return "\n".join([*lines, "", *below])


if __name__ == "__main__":
    if sys.argv[1:2] == ["in"]:
        import serve

        serve.main(jobs(Path(sys.argv[2]), sys.argv[3:]), run=engine, perturb=False)
    else:
        main(sys.argv[1:])
