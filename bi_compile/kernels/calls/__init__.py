"""Shorter ways to operators, for the host's time alone; without them every call arrives as well, the way that PyTorch has.

- `shorten` (`call.cpp`): an OpOverload hands its arguments to a function of PyTorch's that serves every operator, by pybind11 and
  TorchScript's interpreter. One is put before it that knows the operator's schema and calls the dispatcher at once. Compiled code, the
  eager fallback and `bi_compile.ops` all come by it.
- `redirect` and `linear` (`redirect.cpp`): where the eager fallback replaces an operator by one of ours with the same arguments, the
  dispatcher calls that, and not a kernel in Python that does.
- `whole` (`whole.cpp`): where it replaces a pointwise function on a CPU by the same one on whole vectors, threads share them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
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
    ("call.cpp", "redirect.cpp", "whole.cpp"),
    ("-O2", "-std=c++20", "-fopenmp"),
    depends_on=lambda: sysconfig.get_config_var("SOABI") or "",
    ldflags=("-fopenmp",),
    include_folders=_headers,
)
_why_not = ""
"""Why there is none of it, where it cannot be compiled."""


def _load() -> ctypes.PyDLL | None:
    global _why_not
    try:
        EXTENSION.load()
    except (RuntimeError, OSError) as error:
        _why_not = " ".join(str(error).split())[-600:]
        log.warning(
            "bi_compile: operators are called PyTorch's general way, with the same bits and 1 to 5 us more of the host's time a call: %s",
            _why_not,
        )  # fmt: skip
        return None
    library = ctypes.PyDLL(str(EXTENSION.path()))
    text, pointer, anything = ctypes.c_char_p, ctypes.c_void_p, ctypes.py_object
    for name, returns, arguments in (
        ("call", anything, (anything, text)),
        ("redirect", anything, (text, text, text, text)),
        ("native", anything, (text, text, text)),
        ("whole", anything, (text, text, text, pointer)),
        ("linear", anything, (pointer,)),
        ("switch", None, (pointer, ctypes.c_bool)),
        ("switch_all", None, (ctypes.c_bool,)),
        ("own", None, (ctypes.c_bool,)),
    ):
        function = getattr(library, f"bi_compile_{name}")
        function.restype, function.argtypes = returns, arguments
    return library


_lock = threading.Lock()
_tried, _found = False, None


def _library() -> ctypes.PyDLL | None:
    global _tried, _found
    with _lock:
        if not _tried:
            _tried, _found = True, _load()
        return _found


def shorten(operators: Iterable[OpOverload]) -> None:
    """Call these operators the short way from now on, those of them whose arguments and results it takes."""
    library = _library()
    if library is None:
        return
    for op in operators:
        if not is_short(op):
            op._op = library.bi_compile_call(op._op, op._schema.name.encode()) or op._op


def redirect(op: OpOverload, key: str, to: OpOverload) -> int | None:
    """Let the dispatcher call `to`, which has the same arguments, for `op` under a dispatch key whenever the switch that is returned is on
    (`switch`, `switch_all`) and an argument is floating; else the kernel that is there now. None where it cannot be compiled."""
    library = _library()
    return None if library is None else library.bi_compile_redirect(*_names(op, key), to._schema.name.encode())


def _names(op: OpOverload, key: str) -> tuple[bytes, bytes, bytes]:
    return op._schema.name.encode(), op._schema.overload_name.encode(), key.encode()


def native(op: OpOverload, key: str) -> int | None:
    """What computes `op` under a dispatch key, for `whole`. None where it cannot be compiled."""
    library = _library()
    return None if library is None else library.bi_compile_native(*_names(op, key))


def whole(op: OpOverload, key: str, native: int) -> int:
    """Let the dispatcher call `native` on whole vectors, as `ops.pointwise` does, for `op` under a dispatch key whenever the switch that is
    returned is on and its tensors are floating, contiguous and of one size and dtype; else the kernel that is there now."""
    assert _found is not None
    return _found.bi_compile_whole(*_names(op, key), native)


def switch(which: int, on: bool) -> None:
    """Switch a redirection, for every thread."""
    assert _found is not None
    _found.bi_compile_switch(which, on)


def switch_all(on: bool) -> None:
    """While this is off, no redirection is on, whatever its switch says."""
    if _found is not None:
        _found.bi_compile_switch_all(on)


def own(has: bool) -> None:
    """Say of this thread whether its kernels in Python decide: then no redirection holds for it. Where nothing is loaded there is none."""
    if _found is not None:
        _found.bi_compile_own(has)


@contextlib.contextmanager
def linear() -> Iterator[None]:
    """aten::linear is given a kernel in Python in the block, which it need not go to without a bias or for a matrix."""
    library = _library()
    # PyTorch has one kernel of it for every device
    composed = native(torch.ops.aten.linear.default, "CPU")
    yield
    if library is not None:
        library.bi_compile_linear(composed)


def is_short(op: OpOverload) -> bool:
    """Whether it is called the short way."""
    return type(op._op).__name__ == "Call"


def state() -> tuple[bool, str, str]:
    """What `bi-compile doctor` shows once kernels are loaded: (good, what, found)."""
    return not _why_not, "calls of operators", f"PyTorch's general way: {_why_not}" if _why_not else "the short way"
