"""A model served by the real vllm-ascend with tensor parallelism 2, each rank on an emulated NPU, HCCL stood in for by gloo.

    python tests/ascend/serve_ranks.py MODEL '{"compilation_config": {"custom_passes": ["bi_ascend"]}}'

Two processes, a rank each, as torchrun starts them; both schedule the same requests. Prints for each rank how many of 16 requests
differ between running alone and together. Environment: as `serve.py`'s. It has not run to its end yet: no number stands for it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

REQUESTS, RANKS = 16, 2


def rank(model: str, arguments: dict[str, Any]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import emulated_hccl
    import emulated_npu

    emulated_npu.before_vllm()
    emulated_npu.install(perturb=True)
    emulated_hccl.install()
    from vllm import LLM, SamplingParams

    emulated_npu.after_vllm()
    llm = LLM(
        model=model, skip_tokenizer_init=True, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=REQUESTS, dtype="float16", seed=0,
        enable_prefix_caching=False, gpu_memory_utilization=0.05, tensor_parallel_size=RANKS,
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
    print("\n" + json.dumps({"differ": differ, "of": REQUESTS, "collectives": collectives}), flush=True)


def main(*arguments: str) -> int:
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, "as a rank"], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"RANK": str(i), "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
        )
        for i in range(RANKS)
    ]  # fmt: skip
    for i, process in enumerate(ranks):
        said, _ = process.communicate(timeout=1200)
        print(
            f"rank {i}:",
            said.strip().splitlines()[-1] if process.returncode == 0 else f"ended with {process.returncode}",
        )
    return max(abs(process.returncode) for process in ranks)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        rank(sys.argv[1], json.loads(sys.argv[2]))
    else:
        sys.exit(main(*sys.argv[1:]))
