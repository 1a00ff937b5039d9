"""A model served by the real vllm-ascend with tensor parallelism 2, each rank on an emulated NPU, HCCL stood in for by gloo.

    python tests/ascend/serve_ranks.py MODEL '{"name": {"compilation_config": {"custom_passes": ["bi_ascend"]}}}'

For each name, a JSON line of how many of 16 requests differ between running alone and together, which has to be the same on both
ranks, and how far their logprobs are from those of one rank at most ("from one rank"), which says that sums over ranks are sums.
A rank is a fork of this process, with the environment that torchrun would give it; all schedule the same requests. Environment: as
`serve.py`'s.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import emulated_graph
import emulated_npu

REQUESTS = 16


def rank(model: str, ranks: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """What this process finds as one of so many ranks."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, skip_tokenizer_init=True, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=REQUESTS, dtype="float16", seed=0,
        enable_prefix_caching=False, kv_cache_memory_bytes=2**25, tensor_parallel_size=ranks,
        distributed_executor_backend="external_launcher", **arguments,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=2, logprobs=3, detokenize=False)
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(10, 500) for _ in range(rng.randrange(3, 12))]} for _ in range(REQUESTS)
    ]

    def bits(outputs: list[Any]) -> list[Any]:
        return [[[(t, p.logprob) for t, p in step.items()] for step in o.outputs[0].logprobs] for o in outputs]

    alone = [bits(llm.generate([p], greedy, use_tqdm=False))[0] for p in prompts]
    together = bits(llm.generate(prompts, greedy, use_tqdm=False))
    collectives = {name: n for name, n in emulated_npu.LAUNCHES.items() if name.startswith("c10d::")}
    differ = sum(a != b for a, b in zip(alone, together, strict=True))
    return {
        "differ": differ,
        "of": REQUESTS,
        "collectives": collectives,
        "graphs": emulated_graph.COUNTS,
        "answers": alone,
    }


def served(model: str, ranks: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the ranks found, each in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for i in range(ranks):
            sys.stdout.flush()
            if not (pid := os.fork()):
                status = 1
                try:
                    os.environ |= {
                        "RANK": str(i), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(20000 + os.getppid() % 10000), "VLLM_CACHE_ROOT": folder,
                    }  # fmt: skip
                    os.dup2(2, 1)  # what an engine prints
                    Path(folder, str(i)).write_text(json.dumps(rank(model, ranks, arguments)))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(pid)
        if any([os.waitpid(pid, 0)[1] for pid in children]):
            sys.exit("a rank failed")
        found = [json.loads(Path(folder, str(i)).read_text()) for i in range(ranks)]
    if any(other != found[0] for other in found):
        sys.exit(f"the ranks found other things: {found}")
    return dict(found[0])


def farthest(answers: list[Any], others: list[Any]) -> float:
    """Between the logprobs of the first token of each request, for tokens that stand in both."""
    first = [(dict(map(tuple, a[0])), dict(map(tuple, b[0]))) for a, b in zip(answers, others, strict=True)]
    return max(abs(a[token] - b[token]) for a, b in first for token in a.keys() & b.keys())


def main(model: str, cases: dict[str, dict[str, Any]]) -> None:
    emulated_npu.before_vllm()
    emulated_npu.install(perturb=True)
    import emulated_hccl
    import vllm  # noqa: F401
    import vllm_ascend.worker.worker  # noqa: F401

    emulated_hccl.install()
    emulated_npu.after_vllm()
    one = served(model, 1, {"enforce_eager": True, "compilation_config": {"custom_passes": ["bi_ascend"]}})["answers"]
    for name, arguments in cases.items():
        found = served(model, 2, arguments)
        found["from one rank"] = farthest(found.pop("answers"), one)
        print("\n" + json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
