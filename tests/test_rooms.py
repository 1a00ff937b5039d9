"""No private doors: what one package names with an underscore, no other package imports or reaches for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "bi_compile").rglob("*.py"), *(ROOT / "passes").glob("*.py")])


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def doors(package: str, source: str) -> Iterator[str]:
    """Private names of another package of ours that a module of `package` uses, and the functions that it unwraps."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            up = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*up, *(node.module or "").split(".")]).strip(".")
            if module.partition(".")[0] == "bi_compile":
                imported |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
                yield from (f"{module}.{a.name}" for a in node.names if private(a.name) and outside(module, package))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "__wrapped__":
            yield f"line {node.lineno}: __wrapped__"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and private(node.attr):
            owner = imported.get(node.value.id, package)
            if outside(owner, package):
                yield f"{owner}.{node.attr}"


def outside(name: str, package: str) -> bool:
    return not f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_private_of_another_package_is_used(file: Path) -> None:
    folder = file.relative_to(ROOT).parent.parts
    package = ".".join(("bi_compile", *folder) if folder[0] == "passes" else folder)
    assert list(doors(package, file.read_text())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..ops.reduce import _float", ["bi_compile.ops.reduce._float"]),
        ("from .. import ops\nops._float(1)", ["bi_compile.ops._float"]),
        ("def f(): from bi_compile.table import _name", ["bi_compile.table._name"]),
        ("f.__wrapped__(1)", ["line 1: __wrapped__"]),
        ("from .launch import _grid\nfrom ..ops import mm\nself._x, mm.__doc__", []),
    ],
)
def test_a_private_door_is_found(source: str, found: list[str]) -> None:
    assert list(doors("bi_compile.kernels", source)) == found
