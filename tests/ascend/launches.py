"""What one decoder layer launches on the device: the table of docs/use/ascend.md.

    LD_LIBRARY_PATH=.venv-ascend/cann .venv-ascend/bin/python tests/ascend/launches.py      # some 15 minutes

For Qwen3 and Qwen3-MoE served by the real vllm-ascend on the emulated NPU, whose counter (`emulated_npu.LAUNCHES`) knows native
operators, copies and Triton kernels by name: everything between the attention of layer 0 and that of layer 1, in steps of 1,
16 and 256 requests. Prints a Markdown table, and for each cell that differs from vllm-ascend's own the names.

    python tests/ascend/launches.py MODEL '{"compilation_config": ...}'         # one engine; a JSON line
"""

from __future__ import annotations

import concurrent.futures
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


def engine(model: str, arguments: dict[str, Any]) -> None:
    """Serve 1, 16 and 256 requests; print what a layer launched."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import emulated_npu

    emulated_npu.before_vllm()
    emulated_npu.install(perturb=False)
    from vllm import LLM, SamplingParams

    emulated_npu.after_vllm()
    llm = LLM(
        model=model, skip_tokenizer_init=True, max_model_len=64, max_num_batched_tokens=1024, max_num_seqs=max(REQUESTS),
        dtype="float16", seed=0, enable_prefix_caching=False, gpu_memory_utilization=0.05, **arguments,
    )  # fmt: skip
    found = count_layers()
    for n in REQUESTS:
        prompts = [{"prompt_token_ids": [10 + i, 11, 12][: 2 + i % 2]} for i in range(n)]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, detokenize=False), use_tqdm=False)
    print("\n" + json.dumps(found))


def printed(model: Path, arguments: dict[str, Any], environment: dict[str, str]) -> str:
    """The last line of an engine's process."""
    done = subprocess.run(
        [sys.executable, __file__, str(model), json.dumps(arguments)], env=os.environ | environment, capture_output=True, text=True,
        check=False, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    import npu_models
    import test_engine

    package = str(Path(__file__).parents[1] / "helpers" / "stand_in")
    with_package = {"PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])}
    cases = {
        "vllm-ascend alone": ("plain", {}),
        "its batch-invariant mode, with `batch_invariant_ops`": ("VLLM_BATCH_INVARIANT", with_package),
        "ours, through its pass manager": ("pass manager", {}),
        "ours, through npugraph_ex": ("npugraph_ex", {}),
        "ours, eager": ("eager fallback alone", {}),
        "ours, through its pass manager, with `batch_invariant_ops`": ("pass manager", with_package),
    }
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        models = {kind: npu_models.make(kind, Path(folder, kind)) for kind in ("dense", "moe")}
        jobs = {}
        for kind in models:
            for case, (name, environment) in cases.items():
                arguments, own = (test_engine.WITHOUT | test_engine.WITH)[name]
                cache = {"VLLM_CACHE_ROOT": str(Path(folder, f"{kind} {case}"))}
                variables = test_engine.variables(environment.get("PYTHONPATH")) | own | cache
                jobs[kind, case] = pool.submit(printed, models[kind], arguments, variables)
        results = {key: json.loads(job.result()) for key, job in jobs.items()}
    print(table(results))


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
    engine(sys.argv[1], json.loads(sys.argv[2])) if len(sys.argv) > 1 else main()
