"""Requests one at a time and several at once on a running server that speaks OpenAI's API as vLLM does.

Which requests of those that were sent at once shared a step is the server's doing; a mismatch is one all the same. Each
request has a `cache_salt` of its own, so that none reads the keys and values of an earlier one.
"""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import MeasureError
from .requests import settled
from .verify_vllm import PLAN, Requests, compare

_TIMEOUT = 600.0
"""Seconds for one answer."""


class Served(Requests):
    """Requests on a server; each alone, once."""

    def __init__(self, base_url: str, model: str | None, own: dict[str, Any]) -> None:
        super().__init__(None, own)
        url = base_url.rstrip("/")
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        self.tokens = own["tokens"]
        self.salts = (f"bi_compile-{time.time_ns()}-{i}" for i in itertools.count())
        self.model = model or self._call("models")["data"][0]["id"]

    def together(self, batch: list[int]) -> list[Any]:
        salted = [(self.prompts[i], next(self.salts)) for i in batch]
        with ThreadPoolExecutor(len(batch)) as pool:
            return list(pool.map(self._answer, salted))

    def _answer(self, asked: tuple[Any, str]) -> list[list[tuple[str, float]]]:
        """For each token, first, the token with its logprob, then the likeliest ones with theirs."""
        prompt, salt = asked
        body = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else prompt["prompt_token_ids"],
            "max_tokens": self.tokens,
            "temperature": 0,
            "logprobs": 5,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,  # two tokens may be spelled alike
            "cache_salt": salt,
        }
        found = self._call("completions", body)["choices"][0]["logprobs"]
        steps = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
        return [[(token, p), *((t, q) for t, q in top.items() if t != token)] for token, p, top in steps]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url = f"{self.url}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            url, data, {"Content-Type": "application/json", "Authorization": "Bearer none"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:500]
            raise MeasureError(f"{url} answers {error.code}: {said or error.reason}") from None
        except (OSError, ValueError) as error:
            raise MeasureError(
                f"{url} cannot be asked ({error}): start the server, or correct --base-url, as in http://localhost:8000"
            ) from None


def verify(base_url: str, model: str | None = None, **plan: Any) -> dict[str, Any]:
    """Run a plan (keys of `verify_vllm.PLAN`) on the server at `base_url`; model: its name there (default: the first).

    Returns: what `verify_vllm.verify` returns.

    Raises:
        MeasureError: there is no such server, it refuses a request, or it does not give the same answer twice.
    """
    own, unknown = settled(plan, PLAN)
    if unknown:
        raise MeasureError(
            f"a server is asked as it runs: {', '.join(unknown)} can only be given where an engine is started"
        )
    return compare(Served(base_url, model, own), own, time.monotonic())
