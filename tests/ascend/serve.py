"""Models served by the real vllm-ascend on the emulated NPU, their requests alone and together. One JSON line for each.

    python tests/ascend/serve.py '{"name": {"model": MODEL, "arguments": {"compilation_config": {"custom_passes": ["bi_ascend"]}}}}'

A job may have "environment" too. Each is served in a fork of this process, which has imported everything, two at a time; what
it prints goes to the file "log" of the job, or here; its name is printed when it is done. The environment: LD_LIBRARY_PATH with the stand-ins for CANN, VLLM_PLUGINS,
TRITON_INTERPRET=1.

The prompts have up to 60 tokens and are read in chunks; two of 140 have 128 tokens in common, which a cached prefix serves.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import emulated_graph
import emulated_npu

REQUESTS = 16
#: requests in a step -> what one layer's attention launched, for each call
Launches = dict[int, set[tuple[tuple[str, int], ...]]]


def count_attention() -> Launches:
    """What each layer's attention launches from now on, without the cache write, in vllm-ascend's own backend."""
    from vllm_ascend.attention.attention_v1 import AscendAttentionBackendImpl as Impl

    found: Launches = {}
    plain = Impl.forward_fused_infer_attention

    def forward(self: Any, query: Any, key: Any, value: Any, attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        before = emulated_npu.LAUNCHES.copy()
        result = plain(self, query, key, value, attn_metadata, *args, **kwargs)
        launched = tuple(sorted((emulated_npu.LAUNCHES - before).items()))
        found.setdefault(len(attn_metadata.actual_seq_lengths_q), set()).add(launched)
        return result

    Impl.forward_fused_infer_attention = forward
    return found


def prompts() -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    draw = lambda n: [rng.randrange(10, 500) for _ in range(n)]
    lengths = [60, 1, 33, *(rng.randrange(2, 20) for _ in range(REQUESTS - 5))]
    prefix = draw(128)
    return [{"prompt_token_ids": tokens} for tokens in (*map(draw, lengths), prefix + draw(12), prefix + draw(1))]


def serve(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, skip_tokenizer_init=True, max_model_len=256, max_num_batched_tokens=64, max_num_seqs=REQUESTS, seed=0,
        enable_prefix_caching=True, enable_chunked_prefill=True, kv_cache_memory_bytes=2**25, **arguments,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=2, logprobs=3, detokenize=False)

    def bits(output: Any) -> list[list[tuple[int, float]]]:
        return [[(token, entry.logprob) for token, entry in step.items()] for step in output.outputs[0].logprobs]

    attention = count_attention()
    alone = []
    for prompt in prompts():
        alone.append(bits(llm.generate([prompt], greedy, use_tqdm=False)[0]))
        llm.reset_prefix_cache()
    together = [bits(output) for output in llm.generate(prompts(), greedy, use_tqdm=False)]
    # the second time the prefixes of the long ones are in the cache
    again = [bits(output) for output in llm.generate(prompts()[-2:], greedy, use_tqdm=False)]
    differ = sum(a != b for a, b in zip(alone, together, strict=True))
    launches = {n: [dict(calls) for calls in sorted(found)] for n, found in sorted(attention.items())}
    return {
        "differ": differ, "of": len(alone), "differ behind a cached prefix": sum(a != b for a, b in zip(alone[-2:], again, strict=True)),
        "graphs": emulated_graph.COUNTS, "answers": alone, "launches of attention": launches,
    }  # fmt: skip


def in_a_fork(name: str, job: dict[str, Any], run: Callable[[str, dict[str, Any]], Any]) -> int:
    """The process that serves the job and prints what `run` returns of its model and arguments."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if "log" in job:
            file = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
        os.environ.update(job.get("environment", {}))
        print("\n" + json.dumps({name: run(job["model"], job["arguments"])}), flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(
    jobs: dict[str, dict[str, Any]], run: Callable[..., Any] = serve, perturb: bool = True, at_a_time: int = 2
) -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # a test's worker keeps to one core
    emulated_npu.before_vllm()
    emulated_npu.install(perturb=perturb)
    import vllm  # noqa: F401
    import vllm_ascend.worker.worker  # noqa: F401

    emulated_npu.after_vllm()
    failed, running = [], {}
    for name, job in jobs.items():
        if len(running) == at_a_time:
            _wait(running, failed)
        running[in_a_fork(name, job, run)] = name
    while running:
        _wait(running, failed)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _wait(running: dict[int, str], failed: list[str]) -> None:
    pid, status = os.wait()
    name = running.pop(pid)
    print(name, flush=True)
    if status:
        failed.append(name)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
