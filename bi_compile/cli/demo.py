"""What `bi-compile demo` prints."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..demo import show as measured
from ..demo.show import Answer, Row, words
from . import console


def show(out: Console) -> bool:
    """Measure, print the table; True if it is as claimed: nothing differs with the pass, and something does without it."""
    start = time.perf_counter()
    rows: list[Row] = []
    with console.progress_bar(out) as progress:
        for row in measured.run(progress):
            rows.append(row)
            for side, outcome in (("without", row.without), ("with", row.with_)):
                if outcome.error:
                    out.print(f"[red]failed:[/] {escape(outcome.error)}")
                if not out.is_terminal:  # no bar is drawn there
                    out.print(f"{row.case.part}: {row.case.what}; {side}: {outcome.text} ({outcome.seconds:.0f} s)")
            for answer in row.changed:
                out.print(dialogue(answer))
    out.print(table(rows))
    wrong = measured.faults(rows)
    for sentence in wrong:
        out.print(f"[red]{escape(sentence)}[/]")
    seconds = time.perf_counter() - start
    out.print(f"{seconds:.0f} s in all. {'' if wrong else 'As claimed: with the pass nothing differs.'}")
    return not wrong


def dialogue(answer: Answer) -> Table:
    """A question and its answers; words that the batch changed stand in [brackets]."""
    found = Table.grid(padding=(0, 2))
    found.add_column(no_wrap=True, style="dim")
    found.add_column()
    found.add_row("question", Text(answer.question, style="bold"))
    found.add_row("alone", Text(" ".join(answer.alone.split())))
    found.add_row("in a batch", marked(answer.alone, answer.together))
    if answer.with_alone == answer.with_together:
        found.add_row("with the pass, alone and in a batch", Text(" ".join(answer.with_alone.split())))
    else:
        found.add_row("with the pass, alone", Text(" ".join(answer.with_alone.split())))
        found.add_row("with the pass, in a batch", marked(answer.with_alone, answer.with_together))
    found.add_row("", "")
    return found


def marked(alone: str, together: str) -> Text:
    found = Text()
    for piece, changed in words(alone, together):
        text = " ".join(piece.split())
        found.append(f"[{text}]" if changed else text, style="bold red" if changed else "")
        found.append(" ")
    return found


def table(rows: list[Row]) -> Table:
    """What differs without the pass and with it, a line for each case."""
    numbers = ("without", "with bi_ascend", "seconds")
    found = console.table("Results that change when batched", "what", *numbers, right=numbers, lines=True)
    for r in rows:
        good = not r.with_.error and r.with_.differ == 0
        seconds = f"{r.without.seconds:.0f}, {r.with_.seconds:.0f}"
        without, with_ = (text.replace(", text", "\ntext") for text in (r.without.text, r.with_.text))
        cell = f"[{'green' if good else 'red'}]{with_}[/]"
        found.add_row(f"{r.case.part}\n{r.case.what}", without, cell, seconds)
    return found
