"""Links of the README that work on PyPI, and the project's URLs, for a release: release_links.py https://host/owner/name v1.2.3

In the repository the README's links are relative, so that they lead to the same commit wherever it is read. PyPI knows no
repository. So a release, and nothing else, rewrites them, for its own tag; pyproject.toml gets `[project.urls]`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def absolute(text: str, repository: str, tag: str) -> str:
    """Markdown and HTML whose relative links lead to the files of a tag; pictures to their raw form."""

    def link(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        kind = "raw" if target.endswith((".svg", ".png")) else "blob"
        return f"{before}{repository}/{kind}/{tag}/{target}{after}"

    return re.sub(r'((?:href|src|srcset)=")([^"]+)(")', link, re.sub(r"(\]\()([^)\s]+)(\))", link, text))


def urls(repository: str, tag: str) -> str:
    return "\n".join(
        (
            "[project.urls]",
            f'Documentation = "{repository}/blob/{tag}/docs/index.md"',
            f'Source = "{repository}"',
            f'Issues = "{repository}/issues"',
            f'Changelog = "{repository}/blob/{tag}/CHANGELOG.md"',
            "",
            "",
        )
    )


def main(repository: str, tag: str, root: Path = Path()) -> None:
    readme, project = root / "README.md", root / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(), repository, tag))
    before = project.read_text()
    mark = "[project.optional-dependencies]"
    if mark not in before or "[project.urls]" in before:
        raise SystemExit(f"{project}: expected {mark}, and no [project.urls] yet")
    project.write_text(before.replace(mark, urls(repository, tag) + mark))


if __name__ == "__main__":
    main(*sys.argv[1:3])
