"""`custom_passes` as a key of vLLM's compilation config: by every way in, and refused in sentences."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from engines import environment, python

Model = Callable[[str], Path]
CONFIG = """
from vllm.engine.arg_utils import EngineArgs
def engine_config(compilation={compilation!r}, additional={additional!r}):
    return EngineArgs(model={model!r}, skip_tokenizer_init=True, max_model_len=256, dtype="bfloat16",
                      compilation_config=compilation, additional_config=additional).create_engine_config()
"""


def configured(model: Path, body: str, compilation: object = None, additional: object = None, **env: str) -> subprocess.CompletedProcess[str]:
    head = CONFIG.format(model=str(model), compilation=compilation if compilation is not None else {"custom_passes": ["bi_ascend"]}, additional=additional or {})
    return python(["-c", head + textwrap.dedent(body)], **env)


def test_the_key_puts_pass_and_settings_into_the_engine_config(model: Model) -> None:
    run = configured(
        model("llama"),
        """
        import pickle
        a, b = engine_config(), engine_config()
        p = a.compilation_config.inductor_compile_config["post_grad_custom_post_pass"]
        print(type(p).__name__, a.compilation_config.custom_passes)
        print(a.compute_hash() == b.compute_hash(), pickle.loads(pickle.dumps(a)).compute_hash() == a.compute_hash())
        print(a.compute_hash() != engine_config({"custom_passes": ["matmul"]}).compute_hash())
        """,
    )
    assert run.stdout.split("\n")[-4:-1] == ["PostGradPass ['bi_ascend']", "True True", "True"], run.stdout + run.stderr


def test_without_the_key_the_configuration_is_vllms_own(model: Model) -> None:
    body = """
    c = engine_config()
    print("post_grad_custom_post_pass" in c.compilation_config.inductor_compile_config, c.compilation_config.custom_ops)
    """
    run = configured(model("llama"), body, compilation={"cudagraph_mode": "NONE"})
    assert run.stdout.split("\n")[-2] == "False ['none']", run.stdout + run.stderr


def test_an_unknown_pass_stops_with_the_list_of_names(model: Model) -> None:
    run = configured(model("llama"), "engine_config()", compilation={"custom_passes": ["bi_descend"]})
    assert run.returncode != 0
    assert "unknown pass 'bi_descend': known are bi_ascend, add_rms_norm" in run.stderr


def test_a_malformed_option_stops_with_its_name(model: Model) -> None:
    for additional, sentence in (
        ({"bi_compile": {"on_unprovn": "warn"}}, "unknown option 'on_unprovn': bi_compile knows on_unproven"),
        ({"bi_compile": {"on_unproven": "never"}}, "on_unproven='never': it is 'error' or 'warn'"),
        ({"bi_compile": ["warn"]}, "the options of bi_compile are a mapping"),
        ({"bi_compile": {"dump_dir": "/dev/null/dump"}}, "dump_dir='/dev/null/dump' cannot be written"),
    ):
        run = configured(model("llama"), "engine_config()", additional=additional)
        assert run.returncode != 0 and sentence in run.stderr, run.stderr[-2000:]


def test_a_setting_against_the_guarantee_stops_with_the_line_to_write(model: Model) -> None:
    run = configured(model("llama"), "engine_config()", VLLM_CPU_ATTN_SPLIT_KV="1")
    assert run.returncode != 0 and "set VLLM_CPU_ATTN_SPLIT_KV=0 or unset it" in run.stderr


def test_a_users_pass_and_a_users_inductor_pass_are_taken_along(model: Model, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            from bi_compile import Pass, replaces
            class Mine(Pass):
                name = "mine"
                @replaces("aten.tanh.default", why="a test", source="a test")
                def tanh(self):
                    return self.sinh() / self.cosh()
            """
        )
    )
    run = configured(
        model("llama"),
        """
        from vllm.compilation.passes.inductor_pass import CallableInductorPass
        def theirs(graph): pass
        c = engine_config({"custom_passes": ["bi_ascend", "mine:Mine"], "inductor_compile_config": {"post_grad_custom_post_pass": CallableInductorPass(theirs)}})
        p = c.compilation_config.inductor_compile_config["post_grad_custom_post_pass"]
        print([q.name for q in p.pipeline.passes][-1], type(p.first).__name__)
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert run.stdout.split("\n")[-2] == "mine CallableInductorPass", run.stdout + run.stderr


def test_an_older_vllm_is_refused(model: Model) -> None:
    run = configured(model("llama"), "import vllm; vllm.__version__ = '0.22.1'; engine_config()")
    assert run.returncode != 0 and "needs vLLM 0.23 or newer, this is 0.22.1" in run.stderr, run.stderr[-2000:]


def test_llm_takes_the_key_and_the_command_line_reads_it(model: Model) -> None:
    code = """
    from vllm.entrypoints.llm import LLM
    from vllm.config import CompilationConfig
    from vllm.config.utils import is_init_field
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = EngineArgs.from_cli_args(parser.parse_args(["--compilation-config", '{"custom_passes": ["softmax"]}']))
    print(is_init_field(CompilationConfig, "custom_passes"), args.compilation_config.custom_passes)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert run.stdout.split("\n")[-2] == "True ['softmax']", run.stdout + run.stderr
