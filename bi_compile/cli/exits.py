"""How commands end: one table of exit codes, and every error a sentence on stderr.

    0  done, and nothing was found
    1  found: a row differs, a graph is not batch-invariant or was never judged, certificates differ, something that is needed is missing
    2  it cannot be done as asked: an unknown option, pass or file, a value that does not fit
    3  it failed: the measured code raised an error, its compilation was stopped, the time limit left nothing compared, a process ended early, or a bug of bi-compile
  130  interrupted from the keyboard

docs/use/command-line.md shows the same table.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

OK, FOUND, USAGE, FAILED, INTERRUPTED = 0, 1, 2, 3, 130

show_traces = False
"""Set by `bi-compile --traceback`."""
_OURS = str(Path(__file__).parents[1])


def sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Whatever a command raises becomes a sentence and one of the exit codes; `bi-compile --traceback` shows where it came from."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("bi-compile: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if show_traces:
                traceback.print_exception(error)
            sentence, code = said(error)
            typer.echo(f"bi-compile: {sentence}", err=True)
            raise typer.Exit(code) from None

    return run


def said(error: BaseException) -> tuple[str, int]:
    """An error's sentence and exit code."""
    from ..errors import AuditError, BiCompileError, ProcessError, RewriteError

    # torch.compile wraps what a backend raises
    ours = next((e for e in _chain(error) if isinstance(e, BiCompileError)), None)
    if ours is not None:
        return str(ours), FAILED if isinstance(ours, (AuditError, RewriteError, ProcessError)) else USAGE
    where = _place(error)
    message = " ".join(str(error).split())
    return (
        f"it failed: {type(error).__name__}{f': {message}' if message else ''}{where}; `bi-compile --traceback …` shows the whole trace",
        FAILED,
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        yield found
        found = getattr(found, "inner_exception", None) or found.__cause__ or found.__context__


def _place(error: BaseException) -> str:
    """The last line of the user's own program that ran, else the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((_OURS, "<")) and "site-packages" not in f.filename]
    last = (theirs or list(frames))[-1:]
    return "".join(f", at {f.filename}, line {f.lineno}, in {f.name}" for f in last)
