"""`verify vllm --base-url` and `--prompts`, against a stand-in for a server that answers as it is told; tests/vllm/test_serve.py asks a real one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bi_compile.cli import app
from bi_compile.errors import MeasureError
from bi_compile.measure.verify_vllm import read_prompts


class StandIn(BaseHTTPRequestHandler):
    """A server whose logprobs change by one ULP of a float64 where requests arrive together, if `varies`."""

    varies = True
    bodies: list[dict[str, Any]] = []
    together = threading.Barrier(2)

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if body["model"] != "the-model":
            return self._send(404, {"error": f"no model {body['model']}"})
        p, tokens = -0.5, [f"token_id:{i}" for i in range(body["max_tokens"])]
        if self.varies:
            try:
                self.together.wait(0.2)
            except threading.BrokenBarrierError:
                self.together.reset()
            else:
                p = -0.5000000000000001
        logprobs = {"tokens": tokens, "token_logprobs": [p] * len(tokens), "top_logprobs": [{t: p} for t in tokens]}
        self._send(200, {"choices": [{"logprobs": logprobs}]})

    def _send(self, code: int, found: Any) -> None:
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    StandIn.bodies, StandIn.varies = [], True
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", "vllm", *arguments])


def test_a_server_whose_answers_follow_the_batch_is_found_and_asked_again(url: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one question\n\nanother\n")
    found = ask("--base-url", url, "--prompts", "prompts.txt", "--tokens", "2")
    assert found.exit_code == 1 and "not batch-invariant: request" in found.output, found.output
    assert {b["prompt"] for b in StandIn.bodies} == {"one question", "another"}
    again = ask("counterexample.json")
    assert again.exit_code == 1 and "differs from itself alone" in again.output, again.output
    StandIn.varies = False
    assert ask("counterexample.json").exit_code == 0


def test_a_server_that_answers_alike(url: str) -> None:
    StandIn.varies = False
    found = ask("--base-url", f"{url}/v1/", "--requests", "5", "--tokens", "2", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["mismatch"] is None and result["rows"] == 5 * 5 * 3
    salts = [b["cache_salt"] for b in StandIn.bodies]
    assert len(set(salts)) == len(salts) > 75  # none reads what an earlier one left in a prefix cache


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", "http://127.0.0.1:9", "m"], "cannot be asked"),
        (["--base-url", "URL", "other-model"], "answers 404"),
        (
            ["--base-url", "URL", "--engine-args", '{"dtype": "bfloat16"}'],
            "dtype can only be given where an engine is started",
        ),
        (["--base-url", "URL", "--prompts", "none.txt"], "none.txt cannot be read"),
        ([], "a folder with a model, or --base-url"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_refused_in_a_sentence(arguments: list[str], said: str, url: str) -> None:
    found = ask(*(url if a == "URL" else a for a in arguments))
    assert found.exit_code == 2 and said in found.output and "Traceback" not in found.output, found.output


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('"text"\n[1, 2]\n{"prompt": [3]}\n{"prompt": "more", "id": 7}\n')
    assert read_prompts(file) == ["text", [1, 2], [3], "more"]
    for text, said in (
        ("", "holds no prompt"),
        ("{}", "prompt 1"),
        ("[1.5]", "prompt 1"),
        ("[]", "prompt 1"),
        ("{", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(MeasureError, match=said):
            read_prompts(file)
