"""`custom_passes` as a key of vLLM's compilation config: by every way in, and refused in sentences."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ways
from engines import python

from bi_compile import HostError
from bi_compile.measure.process import ENVIRONMENT
from bi_compile.vllm import engine, platforms

Model = Callable[[str], Path]
#: runs the programs that it is given, one after the other: importing vLLM takes longer than they do
RUN = """
import json, sys, traceback
for line in sys.stdin:
    try:
        exec(json.loads(line), {})
    except BaseException:
        traceback.print_exc()
    print("DONE", flush=True)
"""
CONFIG = """
model = {model!r}
def say(*what):
    print("SAID", *what)
from vllm.engine.arg_utils import EngineArgs
def engine_config(compilation={compilation!r}, additional={additional!r}):
    return EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=256, dtype="bfloat16",
                      compilation_config=compilation, additional_config=additional).create_engine_config()
"""


def config(model: Path, compilation: object = None) -> str:
    return CONFIG.format(
        model=str(model),
        compilation=compilation if compilation is not None else {"custom_passes": ["bi_ascend"]},
        additional={},
    )


@pytest.fixture(scope="module")
def run(model: Model) -> Iterator[Callable[..., str]]:
    """What a program prints that makes configurations of a llama's engine; one process runs all of them."""
    environment = os.environ | ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "INFO"}
    with subprocess.Popen(
        [sys.executable, "-c", RUN], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def output(body: str, compilation: object = None) -> str:
            print(json.dumps(config(model("llama"), compilation) + textwrap.dedent(body)), file=stdin, flush=True)
            return "".join(iter(stdout.readline, "DONE\n"))

        yield output
        process.stdin.close()


def said(output: str) -> list[str]:
    lines = [line.removeprefix("SAID ") for line in output.splitlines() if line.startswith("SAID ")]
    assert lines, output
    return lines


def test_the_key_puts_pass_and_settings_into_the_engine_config(run: Callable[..., str]) -> None:
    output = run(
        """
        import pickle
        a, b = engine_config(), engine_config()
        p = a.compilation_config.inductor_compile_config["post_grad_custom_post_pass"]
        say(type(p).__name__, a.compilation_config.custom_passes)
        say(a.compute_hash() == b.compute_hash(), pickle.loads(pickle.dumps(a)).compute_hash() == a.compute_hash())
        say(a.compute_hash() != engine_config({"custom_passes": ["matmul"]}).compute_hash())
        """,
    )
    assert said(output) == ["VllmPass ['bi_ascend']", "True True", "True"]


def test_without_the_key_the_configuration_is_vllms_own(run: Callable[..., str]) -> None:
    """Though the same process made one with the key."""
    body = """
    c = engine_config()
    say("post_grad_custom_post_pass" in c.compilation_config.inductor_compile_config, c.compilation_config.custom_ops)
    """
    assert said(run(body, compilation={"cudagraph_mode": "NONE"})) == ["False ['none']"]


def test_unknown_passes_and_malformed_options_stop_with_their_name(run: Callable[..., str]) -> None:
    wrong = (
        (
            {"custom_passes": ["bi_descend"]},
            None,
            "unknown pass 'bi_descend' (did you mean 'bi_ascend'?): known are bi_ascend, add_rms_norm",
        ),
        ({"custom_passes": ["no.such.module:Pass"]}, None, "the pass 'no.such.module:Pass' cannot be imported"),
        (
            None,
            {"bi_compile": {"on_unprovn": "warn"}},
            "unknown option 'on_unprovn' (did you mean 'on_unproven'?): bi_compile knows on_unproven",
        ),
        (None, {"bi_compile": {"on_unproven": "never"}}, "on_unproven='never': it must be 'error' or 'warn'"),
        (None, {"bi_compile": ["warn"]}, "the options of bi_compile must be a mapping"),
        (None, {"bi_compile": {"dump_dir": "/dev/null/dump"}}, "dump_dir='/dev/null/dump' cannot be written"),
    )
    body = f"""
    for compilation, additional, sentence in {wrong!r}:
        try:
            engine_config(*([compilation] if compilation else []), **({{"additional": additional}} if additional else {{}}))
        except Exception as error:
            say(sentence in str(error), "" if sentence in str(error) else error)
        else:
            say("no error", sentence)
    """
    assert said(run(body)) == ["True "] * len(wrong)


def test_a_setting_against_the_guarantee_stops_with_the_line_to_write(model: Model) -> None:
    done = python(["-c", config(model("llama")) + "engine_config()"], VLLM_CPU_ATTN_SPLIT_KV="1")
    assert done.returncode != 0 and "set VLLM_CPU_ATTN_SPLIT_KV=0 or unset it" in done.stdout


def test_a_users_pass_and_a_users_inductor_pass_are_taken_along(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            from bi_compile import Pass, replaces
            class Mine(Pass):
                name = "mine"
                @replaces("aten.floor.default", why="a test", source="a test")
                def floor(self):
                    return -(-self).ceil()
            """
        )
    )
    output = run(
        f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        from vllm.compilation.passes.inductor_pass import CallableInductorPass
        def theirs(graph): pass
        c = engine_config({{"custom_passes": ["bi_ascend", "mine:Mine"], "inductor_compile_config": {{"post_grad_custom_post_pass": CallableInductorPass(theirs, uuid="theirs")}}}})
        p = c.compilation_config.inductor_compile_config["post_grad_custom_post_pass"]
        say([q.name for q in p.pipeline.passes][-1], type(p.theirs).__name__)
        """
    )
    assert said(output) == ["mine CallableInductorPass"]


def test_an_older_vllm_is_refused(run: Callable[..., str]) -> None:
    output = run(
        """
        import vllm
        from unittest.mock import patch
        with patch.object(vllm, "__version__", "0.22.1"):
            engine_config()
        """
    )
    assert "Traceback" in output and "needs vLLM 0.23 or newer, this is 0.22.1" in output, output[-2000:]


def test_ways_to_serve_that_are_refused_before_a_model_loads(run: Callable[..., str], tmp_path: Path) -> None:
    """Those of `ways.py`, with the words that its page promises; Ray is not installed here, so that vLLM would refuse it first."""
    refused = {
        w.refused: ways.filled(w.engine, tmp_path)
        for w in ways.WAYS
        if w.tests == "tests/vllm/test_config.py" and w.name != "Ray"
    }
    body = f"""
    for words, settings in {refused!r}.items():
        try:
            EngineArgs(skip_tokenizer_init=True, compilation_config={{"custom_passes": ["bi_ascend"]}}, **({{"model": model}} | settings)).create_engine_config()
        except Exception as error:
            say(words in str(error) and "remove" in str(error), "" if words in str(error) else error)
        else:
            say("no error", settings)
    """
    assert len(refused) > 1 and said(run(body)) == ["True "] * len(refused)
    (ray,) = (w for w in ways.WAYS if w.name == "Ray")
    config = SimpleNamespace(compilation_config=None, parallel_config=SimpleNamespace(**ray.engine))
    with pytest.raises(HostError, match=re.escape(ray.refused)):
        engine._check_mode(config, platforms.current())


def test_llm_takes_the_key_and_the_command_line_reads_it(run: Callable[..., str]) -> None:
    output = run(
        """
        from vllm.entrypoints.llm import LLM
        from vllm.config import CompilationConfig
        from vllm.config.utils import is_init_field
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        line = ["--model", model, "--compilation-config", '{"custom_passes": ["softmax"]}']
        args = EngineArgs.from_cli_args(parser.parse_args(line))
        say(is_init_field(CompilationConfig, "custom_passes"), args.compilation_config.custom_passes)
        """
    )
    assert said(output) == ["True ['softmax']"]


def test_a_number_of_ranks_that_does_not_divide_tp_invariant_is_refused(run: Callable[..., str]) -> None:
    output = run(
        """
        engine = EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=256, tensor_parallel_size=8,
                            distributed_executor_backend="mp", compilation_config={"custom_passes": ["bi_ascend"]},
                            additional_config={"bi_compile": {"tp_invariant": 4}})
        engine.create_engine_config()
        """
    )
    assert (
        "tensor_parallel_size=8 does not divide tp_invariant=4: write tp_invariant as the largest number" in output
    ), output


def test_a_model_that_cannot_be_right_is_refused_before_it_loads(run: Callable[..., str], model: Model) -> None:
    """What a router is to choose: `test_mixtures.py`. 15 experts on 2 ranks are right: each rank has a part of every expert."""
    cases: list[tuple[str, dict[str, object], str]] = [
        (
            "qwen3-moe",
            {"moe_intermediate_size": 255},
            "tensor_parallel_size=2 does not divide moe_intermediate_size=255",
        ),
        ("llama", {"intermediate_size": 511}, "tensor_parallel_size=2 does not divide intermediate_size=511"),
        (
            "llama",
            {"quantization_config": {"quant_method": "nobody_knows"}},
            "Unknown quantization method: nobody_knows. Must be one of",
        ),
        ("qwen3-moe", {"num_experts": 15}, ""),
    ]
    body = f"""
    for folder, changes, words in {[(str(model(family)), *rest) for family, *rest in cases]!r}:
        try:
            EngineArgs(model=folder, skip_tokenizer_init=True, tensor_parallel_size=2, distributed_executor_backend="mp", hf_overrides=changes,
                       compilation_config={{"custom_passes": ["bi_ascend"]}}).create_engine_config()
        except Exception as error:
            say(bool(words) and words in str(error), "" if words in str(error) else error)
        else:
            say(not words, "")
    """
    assert said(run(body)) == ["True "] * len(cases)
