"""Looking for the names that bi_compile hooks and uses in vLLM's source, which is not imported."""

from __future__ import annotations

import ast
from pathlib import Path

from bi_compile.vllm.keys import HOOKED, USED


def absent(package: Path) -> list[str]:
    """`module.name` that the vLLM in the folder `package` does not define; `package` is the folder called vllm."""
    return [
        f"{module}.{name}"
        for module, names in (*HOOKED.items(), *USED.items())
        for name in names
        if not _has(package, module, name)
    ]


def _has(package: Path, module: str, name: str) -> bool:
    path = package.joinpath(*module.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return _defines(ast.parse(file.read_text()).body, name.split("."))
    return False


def _defines(body: list[ast.stmt], parts: list[str]) -> bool:
    """Also what is imported, and what stands under `if` and `try`."""
    for node in body:
        inner = [*getattr(node, "body", []), *getattr(node, "orelse", []), *getattr(node, "handlers", [])]
        if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
            if _defines(inner, parts):  # type: ignore[arg-type]
                return True
        elif parts[0] in _names(node):
            rest = parts[1:]
            return not rest or (isinstance(node, ast.ClassDef) and _defines(node.body, rest))
    return False


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.id for t in targets if isinstance(t, ast.Name)}
