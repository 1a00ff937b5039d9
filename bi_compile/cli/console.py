"""Where commands print, and how they show that they are at work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure.progress import Progress


def console() -> Console:
    """A console that does not squeeze tables into 80 columns when its output is read by a program."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=max(160, found.width))


@contextlib.contextmanager
def progress_bar(out: Console, start: str = "") -> Iterator[Progress]:
    """A bar on `out`, where it is a terminal; what is yielded is what measurements call."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Bar(*columns, console=out, transient=True) as bar:
        task = bar.add_task(start, total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)
