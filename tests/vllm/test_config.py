"""`custom_passes` as a key of vLLM's compilation config: by every way in, and refused in sentences."""

import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

from engines import python

Model = Callable[[str], Path]
CONFIG = """
def say(*what):
    print("SAID", *what)
from vllm.engine.arg_utils import EngineArgs
def engine_config(compilation={compilation!r}, additional={additional!r}):
    return EngineArgs(model={model!r}, skip_tokenizer_init=True, max_model_len=256, dtype="bfloat16",
                      compilation_config=compilation, additional_config=additional).create_engine_config()
"""


def configured(
    model: Path, body: str, compilation: object = None, additional: object = None, **env: str
) -> subprocess.CompletedProcess[str]:
    head = CONFIG.format(
        model=str(model),
        compilation=compilation if compilation is not None else {"custom_passes": ["bi_ascend"]},
        additional=additional or {},
    )
    return python(["-c", head + textwrap.dedent(body)], **env)


def said(run: subprocess.CompletedProcess[str]) -> list[str]:
    lines = [line.removeprefix("SAID ") for line in run.stdout.splitlines() if line.startswith("SAID ")]
    assert lines, run.stdout
    return lines


def test_the_key_puts_pass_and_settings_into_the_engine_config(model: Model) -> None:
    run = configured(
        model("llama"),
        """
        import pickle
        a, b = engine_config(), engine_config()
        p = a.compilation_config.inductor_compile_config["post_grad_custom_post_pass"]
        say(type(p).__name__, a.compilation_config.custom_passes)
        say(a.compute_hash() == b.compute_hash(), pickle.loads(pickle.dumps(a)).compute_hash() == a.compute_hash())
        say(a.compute_hash() != engine_config({"custom_passes": ["matmul"]}).compute_hash())
        """,
    )
    assert said(run) == ["VllmPass ['bi_ascend']", "True True", "True"]


def test_without_the_key_the_configuration_is_vllms_own(model: Model) -> None:
    body = """
    c = engine_config()
    say("post_grad_custom_post_pass" in c.compilation_config.inductor_compile_config, c.compilation_config.custom_ops)
    """
    run = configured(model("llama"), body, compilation={"cudagraph_mode": "NONE"})
    assert said(run) == ["False ['none']"]


def test_unknown_passes_and_malformed_options_stop_with_their_name(model: Model) -> None:
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
    assert said(configured(model("llama"), body)) == ["True "] * len(wrong)


def test_a_setting_against_the_guarantee_stops_with_the_line_to_write(model: Model) -> None:
    run = configured(model("llama"), "engine_config()", VLLM_CPU_ATTN_SPLIT_KV="1")
    assert run.returncode != 0 and "set VLLM_CPU_ATTN_SPLIT_KV=0 or unset it" in run.stdout


def test_a_users_pass_and_a_users_inductor_pass_are_taken_along(model: Model, tmp_path: Path) -> None:
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
    run = configured(
        model("llama"),
        """
        from vllm.compilation.passes.inductor_pass import CallableInductorPass
        def theirs(graph): pass
        c = engine_config({"custom_passes": ["bi_ascend", "mine:Mine"], "inductor_compile_config": {"post_grad_custom_post_pass": CallableInductorPass(theirs, uuid="theirs")}})
        p = c.compilation_config.inductor_compile_config["post_grad_custom_post_pass"]
        say([q.name for q in p.pipeline.passes][-1], type(p.theirs).__name__)
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert said(run) == ["mine CallableInductorPass"]


def test_an_older_vllm_is_refused(model: Model) -> None:
    run = configured(model("llama"), "import vllm; vllm.__version__ = '0.22.1'; engine_config()")
    assert run.returncode != 0 and "needs vLLM 0.23 or newer, this is 0.22.1" in run.stdout, run.stdout[-2000:]


def test_llm_takes_the_key_and_the_command_line_reads_it(model: Model) -> None:
    code = """
    from vllm.entrypoints.llm import LLM
    from vllm.config import CompilationConfig
    from vllm.config.utils import is_init_field
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", {model!r}, "--compilation-config", '{{"custom_passes": ["softmax"]}}']))
    print("SAID", is_init_field(CompilationConfig, "custom_passes"), args.compilation_config.custom_passes)
    """
    run = python(["-c", textwrap.dedent(code.format(model=str(model("llama"))))])
    assert said(run) == ["True ['softmax']"]
