"""Ways to serve a model in vLLM's CPU engine, each tried: a request gets the same bits alone and among others, or the engine is refused.

    python tests/helpers/ways.py ["n-gram speculation" …]      # all; an engine each, a minute or so
    python tests/helpers/ways.py --table                       # docs/reference/ways.md

Prints a line `RESULT {"way": …}` for each: how many requests differ in a token or a logprob, or the refusal. With more than one way of
asking, requests of every way stand in one batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

KEY: dict[str, Any] = {"compilation_config": {"custom_passes": ["bi_ascend"]}}
EQUAL = "equal"


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to serve: what the engine or a request is given, and what must come of it."""

    name: str
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the engine; "$x" as a value: the folder of the model x of `MODELS`."""
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What each request asks for (vLLM's SamplingParams)."""
    refused: str = ""
    """Words of the refusal; empty: the bits are equal."""
    alone: bool = True
    """Whether it has an engine of its own; otherwise one engine answers for all such ways."""
    by_hand: bool = True
    """Whether it is run by hand alone, not in `make test` (test_ways.py)."""
    tests: str = ""
    """The test that stands behind it, if not this program."""
    counted: str = ""
    """A metric of vLLM's that must not be zero, for the way to have been tried."""
    note: str = ""


def asking(name: str, note: str = "", **asked: Any) -> Way:
    return Way(name, asked=asked, alone=False, by_hand=False, note=note)


WAYS = (
    asking("greedy, logprobs"),
    asking("prompt logprobs", prompt_logprobs=3),
    asking("penalties", presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2),
    asking(
        "random sampling, a seed of each request's own", temperature=0.9, seed=7,
        note="where its prompt is read in chunks, vLLM 0.32's CPU engine itself fails (CPU Generator does not use offset)",
    ),
    asking("top-k, a seed", temperature=0.9, top_k=20, seed=7),
    asking("top-p, a seed", temperature=0.9, top_p=0.8, seed=7),
    asking("top-k, top-p and min-p, a seed", temperature=0.9, top_k=50, top_p=0.9, min_p=0.02, seed=7),
    asking("n > 1, a seed", n=3, temperature=0.9, seed=7),
    asking("logit bias", logit_bias={11: 3.0, 12: -4.0}),
    asking("allowed tokens", allowed_token_ids=list(range(100, 400))),
    asking("stop tokens, min_tokens", stop_token_ids=list(range(2000)), min_tokens=3, ignore_eos=False),
    Way("structured output", {"model": "$tokenizer", "skip_tokenizer_init": False}, {"structured_outputs": {"regex": "[a-f]{2,40}"}, "ignore_eos": False}),
    Way("chunked prefill", tests="tests/vllm/test_engine.py", by_hand=False),
    Way("prefix caching", {"enable_prefix_caching": True}, tests="tests/vllm/test_engine.py", by_hand=False),
    Way("preemption", {"num_gpu_blocks_override": 5, "disable_log_stats": False}, {"max_tokens": 100}, counted="vllm:num_preemptions"),
    Way("asynchronous scheduling", {"async_scheduling": True}),
    Way("n-gram speculation", {"enforce_eager": True, "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}}, note="tried with enforce_eager"),
    Way("a draft model", {"enforce_eager": True, "speculative_config": {"model": "$draft", "num_speculative_tokens": 3}}, note="tried with enforce_eager"),
    Way("EAGLE", {"model": "$llama", "speculative_config": {"method": "eagle", "model": "$eagle", "num_speculative_tokens": 2}}),
    Way("keys and values in fp8", {"kv_cache_dtype": "fp8"}, refused="FP8 KV cache on CPU requires x86 with AVX-512 or AMX", note="vLLM itself refuses on a processor without AVX-512; with it vLLM's own attention serves, which this program was not run with"),
    Way("LoRA", {"enable_lora": True}, tests="tests/vllm/test_config.py", by_hand=False, refused="does not cover LoRA's kernels"),
    Way("embeddings (pooling)", {"model": "$tokenizer", "skip_tokenizer_init": False, "runner": "pooling"}),
    Way("prompts as embeddings", {"enable_prompt_embeds": True}, note="beside prompts of tokens"),
    Way("two ranks (tensor parallel)", tests="tests/vllm/test_mixtures.py", by_hand=False),
    Way("pipeline parallel", {"pipeline_parallel_size": 2}),
    Way("data parallel", {"data_parallel_size": 2}),
    Way("data parallel, mixtures of experts", {"model": "$mixture", "data_parallel_size": 2}, tests="tests/vllm/test_config.py", by_hand=False, refused="the ranks send each other tokens for a mixture of experts"),
    Way("experts divided among ranks", {"enable_expert_parallel": True}, tests="tests/vllm/test_config.py", by_hand=False, refused="enable_expert_parallel=True"),
    Way("several engines in a process", tests="tests/vllm/test_several_engines.py", by_hand=False),
    Way("the server", tests="tests/vllm/test_serve.py", by_hand=False),
    Way("W8A8, int8 (compressed-tensors)", tests="tests/vllm/test_odd_engines.py", by_hand=False),
    Way("W8A8, fp8 (compressed-tensors)", tests="tests/vllm/test_odd_engines.py", by_hand=False, refused="a scaled product with float8 operands has no invariant form"),
    Way("4-bit weights (GPTQ, AWQ)", tests="tests/vllm/test_odd_engines.py", by_hand=False, refused="is not known to be batch-invariant"),
    Way("mixtures of experts", tests="tests/vllm/test_mixtures.py", by_hand=False),
    Way("Ray", {"distributed_executor_backend": "ray"}, tests="tests/vllm/test_config.py", by_hand=False, refused='distributed_executor_backend="ray" was not tried'),
)  # fmt: skip


# -- models -----------------------------------------------------------------------------------------------------------


def _small(family: str, folder: Path, **changes: Any) -> Path:
    from bi_compile.measure.models import make

    return make(family, folder, num_hidden_layers=2, **changes)


def _with_tokenizer(folder: Path) -> Path:
    """A qwen3 whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({**{c: i for i, c in enumerate(letters)}, "<end>": len(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    _small("qwen3", folder, eos_token_id=len(letters))
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(folder)
    return folder


def _eagle(folder: Path) -> Path:
    """A head of EAGLE's for the llama: a layer after a product of the last hidden state and the token."""
    import torch
    from safetensors.torch import load_file, save_file

    _small("llama", folder)
    path = folder / "model.safetensors"
    kept = {
        k.removeprefix("model."): v
        for k, v in load_file(path).items()
        if ".layers.0." in k and "input_layernorm" not in k
    }
    hidden = next(iter(v.shape[1] for k, v in kept.items() if k.endswith("q_proj.weight")))
    kept["fc.weight"] = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(0)) * 0.05
    save_file(kept, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen": lambda folder: _small("qwen3", folder),
    "draft": lambda folder: _small("qwen3", folder, seed=0, hidden_size=256, intermediate_size=512),
    "llama": lambda folder: _small("llama", folder),
    "mixture": lambda folder: _small("qwen3-moe", folder),
    "tokenizer": _with_tokenizer,
    "eagle": _eagle,
}


def filled(value: Any, root: Path) -> Any:
    if isinstance(value, Mapping):
        return {k: filled(v, root) for k, v in value.items()}
    if isinstance(value, str) and value.startswith("$"):
        return str(MODELS[value[1:]](root / value[1:]))
    return value


# -- an engine --------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "model": "$qwen", "dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 64, "kv_cache_memory_bytes": 2**27, "skip_tokenizer_init": True,
    "max_num_batched_tokens": 8192, "seed": 0, "enable_prefix_caching": False, **KEY,
}  # fmt: skip
TOKENS = 12


def _prompts(n: int) -> list[Any]:
    """Of 5 to 150 tokens, with parts that repeat."""
    import random

    rng = random.Random(0)
    found = []
    for _ in range(n):
        part = [rng.randrange(10, 250) for _ in range(rng.randint(5, 50))]
        found.append({"prompt_token_ids": part * rng.randint(1, 3)})
    return found


def _embedded(prompt: Any) -> Any:
    """Rows as a prompt, as many as `prompt` has tokens."""
    import torch

    from bi_compile.measure.models import SIZES

    ids = prompt["prompt_token_ids"]
    rows = torch.randn(256, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)) * 0.05
    return {"prompt_embeds": rows[ids].bfloat16()}


class _Ranks:
    """Several data-parallel ranks, each an engine in a process of its own; a request that is asked again goes to the other."""

    def __init__(self, **settings: Any) -> None:
        import asyncio

        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._loop = asyncio.new_event_loop()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

        self._llm, self._ranks = self._loop.run_until_complete(start()), settings["data_parallel_size"]
        self._asked, self._of = 0, dict[str, int]()

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool = False) -> list[Any]:
        import asyncio

        async def last(prompt: Any, how: Any) -> Any:
            rank = self._of[repr(prompt)] = (self._of.get(repr(prompt), len(self._of)) + 1) % self._ranks
            self._asked += 1
            async for output in self._llm.generate(prompt, how, str(self._asked), data_parallel_rank=rank):
                found = output
            return found

        async def every() -> list[Any]:
            return await asyncio.gather(*map(last, prompts, params))

        return self._loop.run_until_complete(every())


def _bits(output: Any) -> Any:
    """What a request got, in a form that can be compared."""
    if hasattr(output.outputs, "data"):
        return output.outputs.data.float().tolist()
    steps = [[{t: p.logprob for t, p in s.items()} for s in o.logprobs] for o in output.outputs]
    prompt = [s and {t: p.logprob for t, p in s.items()} for s in output.prompt_logprobs or []]
    return [[list(o.token_ids) for o in output.outputs], steps, prompt]


def run(ways: list[Way], root: Path, requests: int = 6) -> dict[str, Any]:
    """Of each way's requests those that differ; {"refused": …} where the engine does not start."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    settings = {**SETTINGS, **ways[0].engine}
    try:
        llm = (_Ranks if settings.get("data_parallel_size") else LLM)(**filled(settings, root))
        pooling = settings.get("runner") == "pooling"
        usual = {
            "temperature": 0,
            "max_tokens": TOKENS,
            "logprobs": 3,
            "detokenize": not settings["skip_tokenizer_init"],
            "ignore_eos": True,
        }
        prompts, params = [], []
        for way in ways:
            given = dict(way.asked)
            if "structured_outputs" in given:
                given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
            prompts += _prompts(requests)
            if settings.get("enable_prompt_embeds"):
                prompts[::2] = [_embedded(p) for p in prompts[::2]]
            params += [None if pooling else SamplingParams(**{**usual, **given}) for _ in range(requests)]
        if pooling:
            alone = [llm.encode([p], pooling_task="embed", use_tqdm=False)[0] for p in prompts]
            together = llm.encode(prompts, pooling_task="embed", use_tqdm=False)
        else:
            alone = [llm.generate([p], [s], use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]
            together = llm.generate(prompts, params, use_tqdm=False)
        found: dict[str, Any] = {}
        for i, way in enumerate(ways):
            part = slice(i * requests, (i + 1) * requests)
            found[way.name] = {
                "differ": sum(_bits(a) != _bits(b) for a, b in zip(alone[part], together[part], strict=True))
            }
        for way in ways:
            if way.counted:
                found[way.name][way.counted] = sum(m.value for m in llm.get_metrics() if m.name == way.counted)
                assert found[way.name][way.counted], f"not tried: {way.counted} is 0"
        return found
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        return {way.name: {"refused": f"{type(error).__name__}: {error}"} for way in ways}


def _engines(chosen: list[str]) -> list[list[Way]]:
    """The ways that are run here, those that share an engine together."""
    here = [way for way in WAYS if not way.tests and (not chosen or way.name in chosen)]
    together = [way for way in here if not way.alone]
    return [*([together] if together else []), *([way] for way in here if way.alone)]


# -- the table --------------------------------------------------------------------------------------------------------

HEAD = """\
# Ways to serve

What was tried in vLLM's CPU engine, with the key: a request gets the same bits alone and among others (**equal**), or the engine does not
start and says why (*refused*). `make docs` writes this page from `tests/helpers/ways.py`, where each row stands with what is asked.

| way | outcome | test |
|---|---|---|
"""


def table() -> str:
    rows = []
    for way in WAYS:
        outcome = f"*refused*: “{way.refused}”" if way.refused else f"**{EQUAL}**"
        test = way.tests or ("tests/helpers/ways.py, by hand" if way.by_hand else "tests/vllm/test_ways.py")
        rows.append(
            f"| {way.name}{'; ' + way.note if way.note else ''} | {outcome} | `{test.partition(',')[0]}`{', by hand' if way.by_hand else ''} |"
        )
    return HEAD + "\n".join(rows) + "\n"


def main(arguments: list[str]) -> None:
    if arguments == ["--table"]:
        print(table(), end="")
        return
    import subprocess

    if arguments[:1] == ["--here"]:
        chosen = [way for way in WAYS if way.name in arguments[2:]]
        print("RESULT", json.dumps(run(chosen, Path(arguments[1]))), flush=True)
        return
    from engines import cold_caches

    from bi_compile.measure import process

    with tempfile.TemporaryDirectory() as folder:
        for ways in _engines(arguments):
            caches = cold_caches(Path(folder))
            try:
                done = process.python([__file__, "--here", folder, *(w.name for w in ways)], 540, **caches).stdout
            except subprocess.TimeoutExpired:
                done = f"RESULT {json.dumps({w.name: 'no result after 540 s' for w in ways})}"
            lines = [line for line in done.splitlines() if line.startswith("RESULT ")]
            print("\n".join(lines) or done[-3000:], flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    main(sys.argv[1:])
