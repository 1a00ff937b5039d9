"""The fenced blocks of the documentation, and what a comment before each says of it.

    <!-- needs: an NPU -->              cannot run here, and why
    <!-- tested by: tests/... -->       that file does it, with a model or a server of its own
    <!-- ends with 1 -->                the exit code of a shell block that is not 0
    <!-- given: LINES -->               Python that runs before the block, and that the reader has

Run as a program, it executes the Python blocks of the pages that it is given, a page after another in one process; each page
has names of its own, and each block runs after those above it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import textwrap
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"(?:^ *<!-- (?P<key>needs|tested by|ends with|given):?\s(?P<said>(?:(?!-->).)*?)\s*-->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.M | re.S,
)


@dataclasses.dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    body: str
    key: str | None
    said: str

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and self.key not in ("needs", "tested by")


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for m in _FENCE.finditer(text):
        line = text.count("\n", 0, m.start("body")) + 1
        said = textwrap.dedent(m["said"] or "")
        found.append(Block(page, line, m["language"], textwrap.dedent(m["body"]), m["key"], said))
    return found


def run_python(page: Path) -> None:
    """Raises what the page's blocks raise; a trace names the page and its lines."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.runs and block.language == "python":
            if block.key == "given":
                exec(compile(block.said, f"given before line {block.line} of {page.name}", "exec"), names)
            exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), names)


if __name__ == "__main__":
    failed = []
    for name in sys.argv[1:]:
        try:
            run_python(Path(name))
        except BaseException:
            traceback.print_exc()
            failed.append(name)
        else:
            print("ran", os.path.relpath(name, ROOT), flush=True)
    sys.exit(bool(failed))
