"""What a compiler's cache depends on: this package's source, the passes' source, the options and torch's version."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .resolve import Resolved
from .table import Pass, Replacement

#: rooms that change no graph; every other file of the package is part of the key
WITHOUT = ("bench", "cli", "demo", "measure", "offline")
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".py")


def source_files(package: Path) -> Iterator[Path]:
    """The files of the package in the folder `package` that change a graph, by their path in it; `passes` may be a link."""
    for folder, folders, files in os.walk(package, followlinks=True):
        folders[:] = [f for f in folders if Path(folder) != package or f not in WITHOUT]
        yield from ((Path(folder) / f).relative_to(package) for f in files if f.endswith(SUFFIXES))


def digest_of(package: Path) -> str:
    """A digest of the source in the folder `package`: one for a checkout, an unpacked sdist and a wheel of one commit."""
    h = hashlib.sha256()
    for path in sorted(source_files(package)):
        h.update(f"{path.as_posix()}\0".encode() + hashlib.sha256((package / path).read_bytes()).digest())
    return h.hexdigest()


@functools.cache
def source_digest() -> str:
    """`digest_of` this package."""
    return digest_of(Path(__file__).parent)


def pass_digest(p: type[Pass]) -> str:
    """A digest of the source of a pass and of the modules in which its replacements stand."""
    sources = dict.fromkeys([_source(p), *(_source(entry.replacement) for entry in p.entries)])
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def _source(part: type[Pass] | Replacement) -> str:
    """The source of the module that holds `part`, or where it has no file that of `part` alone."""
    module = inspect.getmodule(part)
    return inspect.getsource(module if module is not None and hasattr(module, "__file__") else part)


def digest(resolved: Resolved) -> str:
    """A digest of all that decides what a graph becomes."""
    h = hashlib.sha256(f"{torch.__version__} {source_digest()}".encode())
    settings = dataclasses.asdict(resolved.options) | {"probe": resolved.probe}
    h.update(json.dumps(settings, sort_keys=True, default=dict).encode())
    for p in resolved.passes:
        h.update(pass_digest(p).encode())
    return h.hexdigest()
