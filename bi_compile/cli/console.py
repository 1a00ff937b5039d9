"""Where commands print, and how they show that they are at work."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..measure.progress import Progress


#: an option of commands that a program may want to read
Json = Annotated[bool, typer.Option("--json", help="print JSON, for a program")]


def print_json(found: Any) -> None:
    typer.echo(json.dumps(found, indent=1))


def write(path: Path, text: str, option: str) -> None:
    """Raises OptionError: the file that `option` names cannot be written."""
    try:
        path.write_text(text)
    except OSError as error:
        raise OptionError(
            f"{option} {str(path)!r} cannot be written ({error.strerror}): name a file that can"
        ) from error


def console(stderr: bool = False) -> Console:
    """As wide as the terminal, or as COLUMNS says; 160 columns where a program reads the output and COLUMNS says nothing.

    stderr: for what shows that a command is at work while its output is JSON.
    """
    from rich.console import Console

    found = Console(stderr=stderr)
    return found if found.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(stderr=stderr, width=160)


def table(
    title: str, *columns: str, right: Sequence[str] = (), whole: Sequence[str] = (), lines: bool = False
) -> Table:
    """A table in which nothing is cut: what does not fit its column goes on in the next line.

    right: the columns of numbers. whole: columns whose words are not broken. lines: a line between rows, where a cell has several.
    """
    from rich import box
    from rich.table import Table

    found = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_lines=lines,
    )
    for name in columns:
        found.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in whole)
    return found


@contextlib.contextmanager
def progress_bar(out: Console, start: str = "") -> Iterator[Progress]:
    """A bar on `out`, where it is a terminal; what is yielded is what measurements call."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # a long description is what gives way in a narrow window, by a further line
    text = TextColumn("{task.description}", table_column=Column(ratio=1, overflow="fold"))
    columns = text, BarColumn(20), TaskProgressColumn(), TimeElapsedColumn()
    with Bar(*columns, console=out, transient=True) as bar:
        task = bar.add_task(start, total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)
