"""The command line: `bi-compile demo | inspect DIR | doctor | passes`.

Exit codes: 0 all is well; 1 the demonstration or the doctor found something else than it should; 2 a command that
cannot be carried out, with one sentence that says why.
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
        from .errors import BiCompileError

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
    from .demo import show

    raise typer.Exit(0 if show.run(console()) else 1)


@app.command()
@_sentences
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that the option dump_dir named")],
) -> None:
    """Print a dump: the graphs, what each pass did, what is left or trusted, and why."""
    from . import inspection

    out = console()
    for table in inspection.tables(folder):
        out.print(table)


@app.command()
@_sentences
def doctor() -> None:
    """Check this machine: versions, kernels, plugins, settings. Exit code 1 if something that is needed is missing."""
    from . import diagnosis

    raise typer.Exit(0 if diagnosis.show(console()) else 1)


@app.command()
@_sentences
def passes(markdown: Annotated[bool, typer.Option("--markdown", help="as docs/operators.md")] = False) -> None:
    """Print the reference table: each operator, by what it is replaced, why, and where that is known from."""
    from . import reference

    if markdown:
        typer.echo(reference.markdown(), nl=False)
    else:
        out = console()
        for table in reference.tables():
            out.print(table)


@app.command()
@_sentences
def audit(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="a folder with a config.json of transformers")],
    target: Annotated[str, typer.Option(help="ascend-a2, ascend-a3 or ascend-950")],
) -> None:
    """Say what the passes would do to a model on Ascend, without an NPU. Exit code 1 if something is left."""
    from . import offline

    raise typer.Exit(0 if offline.main(model, target, console()) else 1)


if __name__ == "__main__":
    app()
