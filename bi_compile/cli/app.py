"""The command line: `bi-compile demo | bench | inspect DIR | audit PATH | doctor | passes | verify … | bisect … | probe`.

Exit codes: 0 all is well; 1 the demonstration or the doctor found something else than it should, two certificates differ,
or a row does; 2 a command that cannot be carried out, with one sentence that says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

# what a command needs is imported when it runs: `bi-compile --help` must not wait for a compiler
app = typer.Typer(
    name="bi-compile",
    help="Batch-invariant compilation: the same bits whether a request runs alone or among others.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _sentences(command: Callable[..., None]) -> Callable[..., None]:
    """A user's error is one sentence on stderr and exit code 2, not a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from ..errors import BiCompileError

        try:
            command(*args, **kwargs)
        except BiCompileError as error:
            typer.echo(f"bi-compile: {error}", err=True)
            raise typer.Exit(2) from None

    return run


def console() -> Any:
    """A console that does not squeeze tables into 80 columns when its output is read by a program."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=max(160, found.width))


@app.command()
@_sentences
def demo() -> None:
    """Show what varies with the batch, and that it does not with the pass: real vLLM and torch.compile on this CPU."""
    from ..demo import show

    raise typer.Exit(0 if show.run(console()) else 1)


@app.command()
@_sentences
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="these alone: product, engine, …")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="DIR", help="write each table into DIR/NAME.csv too")] = None,
) -> None:
    """Measure what invariance costs on this device, as ratios against peers in the same run."""
    from .. import bench

    bench.run(names or [], csv, console())


@app.command()
@_sentences
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that the option dump_dir named")],
) -> None:
    """Print a dump: the graphs, what each pass did, what is left or trusted, and why."""
    from . import inspect as dumps

    out = console()
    for table in dumps.tables(folder):
        out.print(table)


@app.command()
@_sentences
def audit(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="an audit.json, or a folder that dump_dir named; with --target a model's folder"
        ),
    ],
    check: Annotated[bool, typer.Option("--check", help="compare two; exit code 1 if they differ")] = False,
    target: Annotated[
        str | None, typer.Option(help="ascend-a2, ascend-a3 or ascend-950: audit a model of transformers for it, here")
    ] = None,
) -> None:
    """Print certificates, node by node; with --check A B, say what differs between two.

    With --target, say what the passes would do to a model on Ascend, without an NPU; exit code 1 if something is left.
    """
    from ..audit import certificate
    from ..errors import OptionError

    if target is not None and (check or len(paths) != 1):
        raise OptionError("audit --target takes one folder of a model, and no --check")
    if target is not None:
        from ..offline import trace

        raise typer.Exit(0 if trace.main(paths[0], target, console()) else 1)
    if len(paths) != (2 if check else 1):
        raise OptionError(f"audit takes {'two paths with --check' if check else 'one path'}, got {len(paths)}")
    out = console()
    if check:
        table, count = certificate.differences(*paths)
        out.print(table)
        raise typer.Exit(1 if count else 0)
    for table in certificate.tables(certificate.read(paths[0])):
        out.print(table)


@app.command()
@_sentences
def doctor(
    probe: Annotated[Path | None, typer.Option(help="a file of `bi-compile probe`: is it of this machine?")] = None,
) -> None:
    """Check this machine: versions, kernels, plugins, settings. Exit code 1 if something that is needed is missing."""
    from . import doctor as checks

    raise typer.Exit(0 if checks.show(console(), probe) else 1)


@app.command()
@_sentences
def passes(
    markdown: Annotated[bool, typer.Option("--markdown", help="as docs/reference/operators.md")] = False,
) -> None:
    """Print the reference table: each operator, by what it is replaced, why, and where that is known from."""
    from . import reference

    if markdown:
        typer.echo(reference.markdown(), nl=False)
    else:
        out = console()
        for table in reference.tables():
            out.print(table)


# -- what can be measured ---------------------------------------------------------------------------------------------

_COMPARE = dict(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
verify_app = typer.Typer(help="Compare each row among others with the row alone, as bits.", **_COMPARE)  # type: ignore[arg-type]
bisect_app = typer.Typer(help="Name the first operator whose row differs.", **_COMPARE)  # type: ignore[arg-type]
app.add_typer(verify_app, name="verify")
app.add_typer(bisect_app, name="bisect")

FunctionPath = Annotated[str, typer.Argument(metavar="FUNCTION", help="package.module:name of a function or a model")]
Inputs = Annotated[
    str, typer.Option(help="package.module:name of a function that returns its arguments, all rows together")
]
BatchDims = Annotated[str, typer.Option(help="the batch dimension of every tensor, or one for each input: 0,none")]
Backend = Annotated[str | None, typer.Option(help="compile it with this backend of torch.compile")]
Seed = Annotated[int, typer.Option(help="of what is drawn at random")]
Limit = Annotated[float, typer.Option(help="seconds after which nothing new starts")]
Model = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="a folder with a model")]
Config = Annotated[str | None, typer.Option(help="vLLM's compilation config, as JSON")]
EngineArgs = Annotated[str, typer.Option(help='more arguments of vllm.LLM, as JSON: {"dtype": "bfloat16"}')]


def _function(fn: str, inputs: str, batch_dims: str) -> tuple[str, list[Any], Any]:
    """The first three arguments of `verify` and `bisect`."""
    import os
    import sys

    from ..errors import MeasureError
    from ..measure.row_function import load

    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    made = load(inputs)()
    try:
        dims = [None if d.strip() == "none" else int(d) for d in batch_dims.split(",")]
    except ValueError:
        raise MeasureError(f"--batch-dims {batch_dims}: numbers or none, as in 0 or 0,none") from None
    every = dims[0] if len(dims) == 1 and dims[0] is not None else dims
    return fn, list(made) if isinstance(made, (tuple, list)) else [made], every


def _plan(config: str | None, engine: str, **own: Any) -> dict[str, Any]:
    """The plan of an engine: vLLM's arguments and ours."""
    import json

    from ..errors import MeasureError

    try:
        found = json.loads(engine) | ({"compilation_config": json.loads(config)} if config else {})
    except (ValueError, TypeError) as error:
        raise MeasureError(f"--compilation-config and --engine-args are JSON objects ({error})") from None
    return found | own


@verify_app.command("function")
@_sentences
def verify_function(
    fn: FunctionPath,
    inputs: Inputs,
    batch_dims: BatchDims = "0",
    backend: Backend = None,
    seed: Seed = 0,
    time_limit: Limit = 300.0,
    write: Annotated[Path, typer.Option(help="the program to write where a row differs")] = Path("counterexample.py"),
) -> None:
    """A Python function, a model or something compiled. Exit code 1 if a row differs."""
    from ..measure import verify
    from ..measure.row_function import Case

    out = console()
    given = _function(fn, inputs, batch_dims)
    evidence = verify.verify(*given, backend=backend, seed=seed, time_limit=time_limit, console=out)
    out.print(verify.table(evidence))
    typer.echo(evidence.line())
    if evidence.mismatch is not None:
        verify.write(Case(*given, backend), evidence.mismatch, write)
        typer.echo(f"to see it again: python {write}")
    raise typer.Exit(0 if evidence.equal else 1)


@verify_app.command("vllm")
@_sentences
def verify_engine(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", help="a folder with a model, or counterexample.json to run that one again"),
    ],
    compilation_config: Config = None,
    engine_args: EngineArgs = "{}",
    requests: Annotated[int, typer.Option(help="how many")] = 16,
    tokens: Annotated[int, typer.Option(help="how many for each request")] = 8,
    seed: Seed = 0,
    time_limit: Limit = 60.0,
    write: Annotated[Path, typer.Option(help="the plan to write where a request differs")] = Path(
        "counterexample.json"
    ),
) -> None:
    """A vLLM engine: requests alone and together, their logprobs and tokens. Exit code 1 if a request differs."""
    import json

    from ..measure import verify_vllm

    again = model.is_file()
    plan = _plan(compilation_config, engine_args, requests=requests, tokens=tokens, seed=seed, time_limit=time_limit)
    if again:
        model, plan = verify_vllm.read(model)
    with console().status("the engine starts, then requests run alone and together"):
        result = verify_vllm.verify(model, **plan)
    typer.echo(verify_vllm.line(result))
    if result["mismatch"] is not None and not again:
        only = {k: result["mismatch"][k] for k in ("request", "batch")}
        write.write_text(json.dumps({"model": str(model.resolve()), **plan, "only": only}))
        typer.echo(f"to see it again: bi-compile verify vllm {write}")
    raise typer.Exit(0 if result["mismatch"] is None else 1)


@app.command()
@_sentences
def probe(
    write: Annotated[Path, typer.Option(help="the file to write")] = Path("probe.json"),
    device: Annotated[str, typer.Option(help="torch's name of the device")] = "cpu",
    operator: Annotated[list[str] | None, typer.Option(help="measure this one alone; may be repeated")] = None,
    seed: Seed = 0,
    time_limit: Limit = 600.0,
) -> None:
    """Measure which native operators of this device vary with the batch; the option `probe` reads the file."""
    import json

    from ..measure import probe as measured

    out = console()
    data = measured.measure(device, seed, time_limit, operator, out)
    write.write_text(json.dumps(data, indent=1))
    out.print(measured.table(data))
    typer.echo(f'written to {write}; options={{"probe": "{write}"}} makes the audit read it')


@bisect_app.command("function")
@_sentences
def bisect_function(
    fn: FunctionPath,
    inputs: Inputs,
    batch_dims: BatchDims = "0",
    backend: Backend = None,
    seed: Seed = 0,
    time_limit: Limit = 120.0,
) -> None:
    """A Python function, a model or something compiled. Exit code 1 if a row differs."""
    from ..measure import bisect

    out = console()
    given = _function(fn, inputs, batch_dims)
    found = bisect.bisect(*given, backend=backend, seed=seed, time_limit=time_limit, console=out)
    _show(out, found, str(found.mismatch))


@bisect_app.command("vllm")
@_sentences
def bisect_engine(
    model: Model, compilation_config: Config = None, engine_args: EngineArgs = "{}", seed: Seed = 0
) -> None:
    """A vLLM engine, its compiled graphs run node by node. Exit code 1 if a request differs."""
    from ..measure import bisect_vllm, verify_vllm

    out = console()
    with out.status("the engine starts, then requests run alone and together, operator by operator"):
        mismatch, found = bisect_vllm.bisect(model, **_plan(compilation_config, engine_args, seed=seed))
    _show(out, found, verify_vllm.sentence(mismatch) if mismatch else "")


def _show(out: Any, found: Any, mismatch: str) -> None:
    """A bisection: which row, where it first differs, and how that grows."""
    from ..measure import bisect

    if found.first is None:
        typer.echo(found.line())
        raise typer.Exit(0)
    out.print(bisect.table(found))
    typer.echo(f"{mismatch}\n{found.line()}")
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
