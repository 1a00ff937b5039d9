"""What one decoder layer launches on the device: the table of docs/use/ascend.md.

    LD_LIBRARY_PATH=.venv-ascend/cann .venv-ascend/bin/python tests/ascend/launches.py      # over a minute of a core for each of 21 engines

For Qwen3, Qwen3-MoE and a model of DeepSeek-V3's shape served by the real vllm-ascend on the emulated NPU, whose counter
(`emulated_npu.LAUNCHES`) knows native operators, copies and Triton kernels by name: everything from the attention of the last
layer but one to that of the last, in steps of 1, 16 and 256 requests, in replays of captured graphs too (those of 16 serve one request too). Prints a Markdown table, and below it what each engine launched.

    ... tests/ascend/launches.py "moe, ours, eager" "dense, ours, eager"        # these
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parent))

REQUESTS = (1, 16, 256)
#: engine -> its case in test_engine.py
ENGINES = {
    "vllm-ascend alone": "plain", "vllm-ascend alone, through npugraph_ex": "npugraph_ex",
    "its batch-invariant mode, with `batch_invariant_ops`": "VLLM_BATCH_INVARIANT",
    "ours, through its pass manager": "pass manager", "ours, through npugraph_ex": "npugraph_ex",
    "ours, eager": "eager fallback alone", "ours, through its pass manager, with `batch_invariant_ops`": "pass manager",
}  # fmt: skip
#: "decode, 16" -> what a layer launched, for each way that was seen
Launches = dict[str, list[dict[str, int]]]
#: kinds of model, of so many layers each: the last two are alike, and neither is the first, which does what is done once a step
KINDS, LAYERS = ("dense", "moe", "v3"), 3


def count_layers(last: int) -> Launches:
    """What the layer before layer `last` launches in each step from now on; a graph that is captured tells it in each replay."""
    import emulated_graph
    import emulated_npu
    from vllm_ascend.attention.attention_v1 import AscendAttentionBackendImpl
    from vllm_ascend.attention.mla_v1 import AscendMLAImpl

    found: Launches = {}
    before: list[Counter[str]] = []

    def note(layer: str, tokens: int, requests: int) -> None:
        if emulated_graph.capturing():  # then in each replay
            emulated_graph.note(lambda: at(layer, tokens, requests))
        else:
            at(layer, tokens, requests)

    def at(layer: str, tokens: int, requests: int) -> None:
        if f".{last}." in layer:
            name = f"{'decode' if tokens == requests else 'prefill'}, {requests}"
            launched = dict(emulated_npu.LAUNCHES - before.pop())
            if launched not in found.setdefault(name, []):
                found[name].append(launched)
        elif f".{last - 1}." in layer:
            before[:] = [emulated_npu.LAUNCHES.copy()]

    def counted(plain: Any, size: Callable[[Any], tuple[int, int]]) -> Any:
        def forward(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = inspect.signature(plain).bind(self, layer, *args, **kwargs).arguments["attn_metadata"]
            if metadata is not None:
                note(getattr(layer, "layer_name", layer), *size(metadata))
            return plain(self, layer, *args, **kwargs)

        return forward

    AscendAttentionBackendImpl.forward = counted(
        AscendAttentionBackendImpl.forward, lambda m: (m.actual_seq_lengths_q[-1], len(m.actual_seq_lengths_q))
    )
    AscendMLAImpl.forward = counted(
        AscendMLAImpl.forward, lambda m: (m.num_actual_tokens, m.num_decodes + m.num_prefills)
    )
    return found


def engine(model: str, arguments: dict[str, Any]) -> Launches:
    """What a layer launches when 1, 16 and 256 requests are served."""
    from vllm import LLM, SamplingParams

    found = count_layers(json.loads(Path(model, "config.json").read_text())["num_hidden_layers"] - 1)
    llm = LLM(
        model=model, skip_tokenizer_init=True, max_model_len=64, max_num_batched_tokens=1024, max_num_seqs=max(REQUESTS),
        seed=0, enable_prefix_caching=False, gpu_memory_utilization=0.05, **arguments,
    )  # fmt: skip
    found.clear()  # of what warms the engine up
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
        if name.startswith("vllm-ascend alone"):
            compilation = {k: v for k, v in arguments["compilation_config"].items() if k != "custom_passes"}
            arguments = arguments | {"compilation_config": compilation}
        found[case] = {
            "model": str(folder / kind), "arguments": arguments, "log": str(folder / f"{case}.log"),
            "environment": environment | {"VLLM_CACHE_ROOT": str(folder / f"cache of {case}")},
        }  # fmt: skip
    return found


def main(chosen: list[str]) -> None:
    import npu_models
    import test_engine

    cases = chosen or [f"{kind}, {name}" for kind in KINDS for name in ENGINES]
    package = str(Path(__file__).parents[1] / "helpers" / "stand_in")
    with tempfile.TemporaryDirectory() as folder:
        for kind in {case.split(", ")[0] for case in cases}:
            npu_models.make(kind, Path(folder, kind), LAYERS)
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
