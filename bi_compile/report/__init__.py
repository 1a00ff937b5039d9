"""`bi-compile report DIR -o report.html`: a dump as one page that opens offline.

    data      what the page shows, read from a dump
    source    the lines of the user's program, highlighted by Pygments
    page/     the template, its style and scripts; dagre (MIT, page/dagre.LICENSE) lays out the pictures

The page holds its data compressed, and the code around the lines that the graphs came from: who gets the page reads that code.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

from .data import read

_PAGE = Path(__file__).parent / "page"
#: in the order in which they are loaded
_SCRIPTS = ("dagre.min.js", "model.js", "list.js", "picture.js", "nodes.js", "views.js", "app.js")


def make(folder: Path, bisection: Path | None = None) -> str:
    """The page of a dump, as HTML.

    bisection: what `bi-compile bisect --write` wrote, for the curve of its distances.

    Raises:
        OptionError: the folder is no dump, or a file in it cannot be read.
    """
    return render(read(folder, bisection))


def render(data: dict[str, Any]) -> str:
    import jinja2
    from pygments.formatters import HtmlFormatter

    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 9, mtime=0)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        title=data["title"],
        style=(_PAGE / "style.css").read_text(),
        light=HtmlFormatter(style="default").get_style_defs(".code"),
        dark=HtmlFormatter(style="github-dark").get_style_defs("[data-theme=dark] .code"),
        scripts=[(_PAGE / name).read_text() for name in _SCRIPTS],
        licence=(_PAGE / "dagre.LICENSE").read_text(),
        data=base64.b64encode(packed).decode(),
    )
