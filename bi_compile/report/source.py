"""The lines of programs that the nodes came from, highlighted."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

#: lines shown before and after the line that a node came from
AROUND = 6


def excerpts(places: Iterable[tuple[str, int, str]]) -> dict[str, dict[int, str]]:
    """File -> line number -> the line as HTML, for the lines around each place (file, line, its code as it was traced).

    A place whose file is gone, or whose line is another one now, is left out: the page then shows the traced line alone.
    """
    found: dict[str, dict[int, str]] = {}
    for file, line, code in places:
        plain, lines = _file(file)
        if not (0 < line <= len(plain)) or (code and plain[line - 1].strip() != code.strip()):
            continue
        shown = found.setdefault(file, {})
        for n in range(max(1, line - AROUND), min(len(lines), line + AROUND) + 1):
            shown[n] = lines[n - 1]
    return found


@functools.lru_cache(maxsize=256)
def _file(file: str) -> tuple[list[str], list[str]]:
    """A file's lines, as they are and as HTML."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError):
        return [], []
    plain = text.split("\n")
    shown = highlight(text, PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True)).split("\n")
    return plain, shown[: len(plain)]
