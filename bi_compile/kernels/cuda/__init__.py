"""The kernels for CUDA: Triton's, and native ones in C++ where they are proven to have the same order.

- mm and addmm run in cuBLASLt, by algorithms whose bits were compared with the Triton kernel's (`proof`, `product.cpp`), where that is
  faster than the Triton kernel.
- rms_norm, add_rms_norm, qk_norm, softmax, log_softmax, sum, mean and a server's attention (`fill_paged`) launch Triton's own kernels from
  C++ (`launches`, `rows.cpp`, `attention.cpp`), for any number of rows.
- The others, and mm and addmm else, launch them from C++ where a call like it was recorded (`recorded`, `recorded.cpp`).
- moe_gate and moe_combine are computed as they are defined, by other operators.
- What the C++ cannot take runs in `bi_compile.kernels.triton`: the same order, so the same bits.

The C++ is compiled at the first call on a machine. Where that cannot be done the Triton kernels compute everything, which
costs the host more time, and a warning says why.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import triton
from . import build

log = logging.getLogger("bi_compile")

DISPATCH_KEY = "CUDA"
PRODUCTS = ("mm", "addmm")
"""The operators that `product.cpp` implements."""
ROWS = ("rms_norm", "add_rms_norm", "qk_norm", "softmax", "log_softmax", "sum", "mean")
"""The operators that `rows.cpp` implements."""
RECORDED = tuple(name for name in triton.IMPLEMENTATIONS if name not in ROWS)
"""The operators of which `recorded.cpp` repeats what their functions in Triton launched, the products where `product.cpp` hands them on."""
_library: torch.library.Library | None = None
_why_not = ""


def _load_native() -> None:
    """Load the C++ and give its operators what they call in Python, that first: once it is loaded any thread may call them.

    Raises:
        RuntimeError: it cannot be compiled here.
    """
    global _library
    from . import launches, proof, recorded  # the kernels that they tell the C++ about

    functions: dict[str, Callable[..., Any]] = {
        "prove": proof.prove_and_pin,
        **launches.IMPLEMENTATIONS,
    }
    library = torch.library.Library("bi_compile_cuda", "FRAGMENT")
    for name, schema, function in recorded.operators(RECORDED):
        library.define(schema)
        functions[name] = function
    for name, function in functions.items():
        library.impl(name, function, DISPATCH_KEY)
    try:
        build.EXTENSION.load()
    except BaseException:
        library._destroy()
        raise
    _library = library
    launches.give_tables()
    for name in RECORDED:
        if name not in PRODUCTS:
            torch.ops.bi_compile_cuda.take(name)


@functools.cache
def fill_paged() -> Callable[..., None]:
    """Attention of a server's step over keys in pages: `launches.fill_paged`, in C++ where that could be compiled."""
    from bi_compile import ops

    ops.load_kernels("cuda")
    if _library is not None:
        return torch.ops.bi_compile_cuda.fill_paged
    from . import launches

    return launches.fill_paged


def register(library: torch.library.Library) -> None:
    """Give every operator its kernel for CUDA, compiling the C++ if this machine has not done so yet."""
    global _why_not
    try:
        _load_native()
    except (RuntimeError, OSError) as error:
        _why_not = " ".join(str(error).split())[-600:]
        log.warning(
            "bi_compile: the native kernels for CUDA cannot be compiled, so Triton kernels compute everything, with the same bits and "
            "more of the host's time: %s", _why_not,
        )  # fmt: skip
        triton.register(library)


def rests_on() -> dict[str, str]:
    """What the native kernels' proofs hold for, for a certificate; loads the kernels."""
    from bi_compile import ops

    ops.load_kernels("cuda")
    if _library is None:
        return {"native kernels": "none, Triton computes everything"}
    from . import proof

    facts = proof.circumstances(torch.device("cuda", torch.cuda.current_device()))
    return {
        "cuBLASLt": f"{facts['cuBLASLt']}, its algorithms without split-K, where a proof found the Triton kernel's bits",
        "proof of cuBLASLt": f"{facts['source']} on {facts['device']}, driver {facts['driver']}",
    }


def state() -> Iterator[tuple[bool, str, str]]:
    """What `bi-compile doctor` shows once the kernels are loaded: (good, what, found)."""
    if _library is None:
        yield False, "native kernels", f"not compiled, Triton computes everything: {_why_not}"
        return
    from . import proof

    device = torch.device("cuda", torch.cuda.current_device())
    facts = ", ".join(f"{name} {value}" for name, value in proof.circumstances(device).items())
    yield True, "native kernels", f"loaded; proofs hold for {facts}"
    for problem, choices in proof.read(proof.path_of(device)).items():
        native = sum(bool(c.algorithm) for c in choices)
        refused = sum(len(c.refused) for c in choices)
        yield True, problem, f"cuBLASLt in {native} of {len(choices)} ranges of heights, {refused} algorithms refused"
