"""A call of our operators from Python without PyTorch's general way to one (`call.cpp`): some 1.5 us less of the host's time.

An OpOverload hands its arguments to a function of PyTorch's that serves every operator, by pybind11 and TorchScript's interpreter. `shorten`
puts one before it that knows the operator's schema and calls the dispatcher at once; compiled code, the eager fallback and
`bi_compile.ops` all come by it.
"""

from __future__ import annotations

import ctypes
import logging
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from torch._ops import OpOverload

from ..build import Extension

log = logging.getLogger("bi_compile")


def _headers() -> list[Path]:
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise RuntimeError(f"{folder} has no Python.h: install Python's headers (python3-dev)")
    return [folder]


EXTENSION = Extension(
    "bi_compile_calls",
    Path(__file__).parent,
    ("call.cpp",),
    ("-O2", "-std=c++20"),
    depends_on=lambda: sysconfig.get_config_var("SOABI") or "",
    include_folders=_headers,
)
_why_not = ""
"""Why the general way stays, where it does."""


def shorten(operators: Iterable[OpOverload]) -> None:
    """Call these operators the short way from now on, those of them whose arguments and results it takes."""
    global _why_not
    try:
        EXTENSION.load()
    except (RuntimeError, OSError) as error:
        _why_not = " ".join(str(error).split())[-600:]
        log.warning(
            "bi_compile: operators are called PyTorch's general way, with the same bits and some 1.5 us more of the host's time a call: %s",
            _why_not,
        )
        return
    library = ctypes.PyDLL(str(EXTENSION.path()))
    library.bi_compile_call.restype = ctypes.py_object
    library.bi_compile_call.argtypes = [ctypes.py_object, ctypes.c_char_p]
    for op in operators:
        if not is_short(op):
            op._op = library.bi_compile_call(op._op, op._schema.name.encode()) or op._op


def is_short(op: OpOverload) -> bool:
    """Whether it is called the short way."""
    return type(op._op).__name__ == "Call"


def state() -> tuple[bool, str, str]:
    """What `bi-compile doctor` shows once kernels are loaded: (good, what, found)."""
    return not _why_not, "calls of operators", f"PyTorch's general way: {_why_not}" if _why_not else "the short way"
