"""A model served by the real vllm-ascend on the emulated NPU, its requests alone and together. One JSON line at the end.

    python tests/ascend/serve.py MODEL '{"compilation_config": {"custom_passes": ["bi_ascend"]}}'

The environment: LD_LIBRARY_PATH with the stand-ins for CANN, VLLM_PLUGINS, TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
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


def main(model: str, arguments: dict[str, Any]) -> None:
    emulated_npu.before_vllm()
    emulated_npu.install(perturb=True)
    from vllm import LLM, SamplingParams

    emulated_npu.after_vllm()
    llm = LLM(
        model=model, skip_tokenizer_init=True, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=REQUESTS, dtype="float16", seed=0,
        enable_prefix_caching=False, gpu_memory_utilization=0.05, **arguments,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=2, logprobs=3, detokenize=False)
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(10, 500) for _ in range(rng.randrange(3, 12))]} for _ in range(REQUESTS)
    ]

    def bits(output: Any) -> list[list[tuple[int, float]]]:
        return [[(token, entry.logprob) for token, entry in step.items()] for step in output.outputs[0].logprobs]

    attention = count_attention()
    alone = [bits(llm.generate([p], greedy, use_tqdm=False)[0]) for p in prompts]
    together = [bits(output) for output in llm.generate(prompts, greedy, use_tqdm=False)]
    differ = sum(a != b for a, b in zip(alone, together, strict=True))
    launches = {n: [dict(calls) for calls in sorted(found)] for n, found in sorted(attention.items())}
    print("\n" + json.dumps({"differ": differ, "of": REQUESTS, "launches of attention": launches}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
