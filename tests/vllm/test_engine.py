"""Real vLLM engines on the CPU: a request's logprobs and tokens are the same bits alone and in every batch."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import needs_browser, opened, read_and_search, search
from engines import PASS, cold_caches, python, requests, shows_the_fault
from typer.testing import CliRunner

from bi_compile.cli import app

Model = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("engine")
LONG = {"requests": 32, "batches": [5, 32], "prompt": [5, 300], "tokens": 8, "max_num_batched_tokens": 512}
SHORT = {**LONG, "requests": 12, "batches": [12]}


Ran = Callable[[str, str], tuple[dict[str, Any], str, Path]]


@pytest.fixture(scope="module")
def ran(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """An engine of a family and dtype, run once: its result, what it said, and its dump."""

    @functools.cache
    def run(family: str, dtype: str) -> tuple[dict[str, Any], str, Path]:
        folder = tmp_path_factory.mktemp(family)
        options = {"additional_config": {"bi_compile": {"dump_dir": str(folder / "dump")}}}
        plan = LONG if family == "qwen3" else SHORT
        result, said = requests(model(family), folder, dtype=dtype, **PASS, **options, **plan)
        return result, said, folder / "dump"

    return run


def differing(result: dict[str, Any]) -> int:
    return sum(b["logprobs"] + b["tokens"] for b in result["batches"].values())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", "bfloat16"), ("gemma2", "float32"), ("opt", "bfloat16")],
)
def test_requests_are_equal_alone_and_together(ran: Ran, family: str, dtype: str) -> None:
    """Prompts of up to 300 tokens, so that a batch is prefilled in several chunks."""
    result, said, dump = ran(family, dtype)
    assert differing(result) == 0, result
    assert "left none" in said
    read_and_run(dump)


@needs_browser
def test_the_report_of_an_engine(ran: Ran, tmp_path: Path) -> None:
    """In a browser: what was replaced, where, and what the worker ran without a graph."""
    _, _, dump = ran("qwen3", "bfloat16")
    page = tmp_path / "report.html"
    made = CliRunner().invoke(app, ["report", str(dump), "-o", str(page)])
    assert made.exit_code == 0, made.output
    read_and_search(page, "vllm_ir.rms_norm.default", "bi_compile.rms_norm.default", "qwen3.py")
    with opened(page) as tab:
        tab.click("[data-view=uncompiled]")
        assert tab.locator("tbody tr").count() > 3 and "row-local" in tab.inner_text("main")
        tab.click("[data-view=nodes]")
        assert search(tab, "trusted unified_attention") == 2, "one for each layer"
        assert "layers.0.self_attn" in tab.inner_text("#list")


RUN = "import runpy, sys; [print(path, runpy.run_path(path, run_name='__main__')['__doc__']) for path in sys.argv[1:]]"


def read_and_run(dump: Path) -> None:
    """`bi-compile inspect` reads the dump of an engine, and each program in it runs; attention has stand-ins, and says so."""
    shown = CliRunner().invoke(app, ["inspect", str(dump)])
    assert shown.exit_code == 0 and "graph_uncompiled_000" in shown.output, shown.output
    programs = sorted(map(str, dump.glob("graph_*/*.py")))
    run = python(["-c", RUN, *programs])
    assert run.returncode == 0, run.stdout[-3000:]
    assert len(programs) > 1 and all(path in run.stdout for path in programs)
    for path in programs:
        text = Path(path).read_text()
        assert ("STAND_INS" in text.split('"""')[1]) == ("unified_attention" in text.partition("def forward")[2])


@shows_the_fault
def test_without_the_key_they_differ_and_nothing_is_changed(model: Model, tmp_path: Path) -> None:
    result, said = requests(model("qwen3"), tmp_path, dtype="bfloat16", **LONG)
    assert differing(result) > 0, "this test bench no longer shows the fault"
    assert "bi_compile" not in said


def test_eager_mode(model: Model, tmp_path: Path) -> None:
    """The eager fallback alone (no graph is compiled)."""
    result, said = requests(model("qwen3"), tmp_path, dtype="bfloat16", enforce_eager=True, **PASS, **SHORT)
    assert differing(result) == 0, result
    assert "no graph was compiled here; " in said and "operators judged uncompiled" in said


def test_prefix_caching_and_a_start_from_warm_caches_change_no_bit(model: Model, tmp_path: Path) -> None:
    plan = {"dtype": "bfloat16", "bits": True, **PASS, **SHORT}
    cold, _ = requests(model("llama"), tmp_path, **plan)
    warm, _ = requests(model("llama"), tmp_path, enable_prefix_caching=True, **plan)
    assert differing(cold) == differing(warm) == 0, (cold, warm)
    assert cold["bits"] == warm["bits"]


MYSTERY = """
import sys, traceback, torch
lib = torch.library.Library("testlib", "DEF")
lib.define("mystery(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
lib.impl("mystery", lambda x: x * 2, "CPU")
torch.library.register_fake("testlib::mystery", lambda x: torch.empty_like(x), lib=lib)
from vllm.model_executor.models import llama
from vllm.model_executor.layers.logits_processor import LogitsProcessor
import bi_compile.measure.requests as r
def put(owner, at):
    plain = owner.forward
    def forward(self, *args, **kwargs):
        args = list(args)
        args[at] = torch.ops.testlib.mystery(args[at])  # the line to find
        return plain(self, *args, **kwargs)
    owner.forward = forward
    return owner, plain
for case in sys.argv[2:]:
    on_unproven, place, mode = case.split("-")
    owner, plain = put(*{"model": (llama.LlamaMLP, 0), "logits": (LogitsProcessor, 1)}[place])
    try:
        print("RESULT", r.run({"model": sys.argv[1], "dtype": "bfloat16", "requests": 2, "batches": [2], "tokens": 2,
              "enforce_eager": mode == "eager", "compilation_config": {"custom_passes": ["bi_ascend"]},
              "additional_config": {"bi_compile": {"on_unproven": on_unproven}}}))
    except Exception:
        traceback.print_exc(file=sys.stdout)
    owner.forward = plain
    print("END OF", case, flush=True)
"""


def test_an_operator_that_nobody_knows(model: Model, tmp_path: Path) -> None:
    """ "error" stops before any request, with the operator, the source line and what to do; "warn" runs and says so.

    Logits are computed outside of the compiled graphs. The engines start in one process, each after one that was refused.
    """
    program = tmp_path / "mystery.py"
    program.write_text(MYSTERY)
    first = ["error-model-compiled", "error-model-eager", "error-logits-compiled", "warn-model-compiled"]
    for cases in (first, first[-1:]):  # with warm caches too
        run = python([str(program), str(model("llama")), *cases], **cold_caches(tmp_path))
        rest = run.stdout
        for case in cases:
            said, end, rest = rest.partition(f"END OF {case}\n")
            assert end and "testlib.mystery.default" in said, (case, said[-3000:])
            assert "mystery.py" in said and 'trust={"testlib::mystery"' in said, (case, said[-3000:])
            assert ("RESULT {" in said) == case.startswith("warn"), (case, said[-3000:])
