"""Where in a user's program something happens."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types

import torch

#: what stands here is no place in a user's program
_OURS_AND_TORCHS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")


def place() -> str:
    """`file, line N, in function` of the innermost frame that is neither torch's nor ours nor generated."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS_AND_TORCHS + triton_files()):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"


@functools.cache
def triton_files() -> tuple[str, ...]:
    """The folder of Triton's package; nothing where it is not installed."""
    spec = importlib.util.find_spec("triton")
    return tuple(p + os.sep for p in (spec.submodule_search_locations or ())) if spec else ()
