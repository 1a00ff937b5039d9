"""How fast a report of a deep model is: `python tests/report/speed.py [LAYERS]`, in .venv, 64 layers unless told otherwise.

A Qwen3 of transformers, small but for its depth, through the backend; then the page: the time to make it, its size, the time
until it is open in headless Chromium, and until a search has answered and is on the screen.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from browser import opened

import bi_compile.report

SEARCHES = ("s", "softmax", "layers.63", "replaced bfloat16", "modeling_qwen3", "mm 512", "nothing of this name", "")
ANSWERED = """async (text) => {
  const box = document.getElementById("search"), start = performance.now();
  box.value = text;
  box.dispatchEvent(new Event("input"));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - start;
}"""


def dump(layers: int, folder: Path) -> None:
    config = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=512,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    options = {"inner": "eager", "dump_dir": str(folder)}
    with torch.no_grad():
        torch.compile(model, backend="bi_ascend", options=options)(torch.randint(0, 512, (4, 16)), use_cache=False)


def timed(what: str, f: Any) -> Any:
    start, cpu = time.perf_counter(), time.process_time()
    found = f()
    print(f"{what}: {time.perf_counter() - start:.2f} s, {time.process_time() - cpu:.2f} s of processor time")
    return found


def main(layers: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        timed("compiled and dumped", lambda: dump(layers, Path(name) / "dump"))
        text = timed("page made", lambda: bi_compile.report.make(Path(name) / "dump"))
        page = Path(name) / "report.html"
        page.write_text(text)
        print(f"size: {len(text) / 1e6:.2f} MB")
        start = time.perf_counter()
        with opened(page) as tab:
            print(f"browser started and page open: {time.perf_counter() - start:.2f} s")
            tab.click("[data-view=nodes]")
            print(tab.inner_text("#found"))
            for text in SEARCHES:
                took = tab.evaluate(ANSWERED, text)
                print(f"search {text!r}: {took:.0f} ms, {tab.inner_text('#found')}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
