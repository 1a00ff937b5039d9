"""What bi_compile's C++ for CUDA launches, without a device.

rows.cpp, launches.cpp, attention.cpp and recorded.cpp are compiled and called as they are, on tensors whose device is "cuda" and whose memory is the
host's. In place of the driver stands driver.cpp, which writes a launch down; in place of Triton's compiler, `_compile`, which compiles
nothing and tells apart what Triton compiles apart. So nothing is computed: what is shown is which kernel would run, on what.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bi_compile.kernels.cuda import RECORDED, launches, recorded
from bi_compile.kernels.cuda.build import EXTENSION
from bi_compile.kernels.triton import matmul_tma

HERE = Path(__file__).parent
#: Triton's scratch pointers, behind a kernel's own arguments
SCRATCH = 2
#: what Triton passes for a tensor descriptor
DESCRIPTOR = ["map", "i32", "i32", "i64", "i64"]
#: type of an argument -> numbers that driver.cpp writes down for it, where they are more than one
WORDS = {"map": 16}
#: what Triton's compiler makes up for a descriptor here
SWIZZLE = 3


class Launch(NamedTuple):
    """`what` Triton compiled, as text; pointers among the arguments are ("at", address) or, where they were allocated inside, ("room", bytes)."""

    what: str
    programs: int
    threads: int
    shared: int
    arguments: tuple[Any, ...]


@dataclasses.dataclass
class Seen:
    """What was launched from Python and from C++, each in its order."""

    python: list[Launch] = dataclasses.field(default_factory=list)
    cpp: list[Launch] = dataclasses.field(default_factory=list)


class _Compiled(NamedTuple):
    what: str
    function: int
    kinds: tuple[str, ...]  # Triton's types of the arguments that are passed
    src: Any
    metadata: Any


@functools.cache
def load() -> torch.library.Library:
    """Compile the C++ if need be, and give its operators what they call in Python, for as long as the result is kept: here."""
    library = torch.library.Library("bi_compile_cuda", "FRAGMENT")
    for name, function in launches.IMPLEMENTATIONS.items():
        library.impl(name, function, "CUDA")
    for name, schema, function in recorded.operators(RECORDED):
        library.define(schema)
        library.impl(name, function, "CUDA")
    own = (str(HERE / name) for name in ("driver.cpp", "absent.cpp"))
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    dataclasses.replace(
        EXTENSION,
        prefix="bi_compile_cuda_stand_in",
        sources=("rows.cpp", "launches.cpp", "attention.cpp", "recorded.cpp", *own),
        flags=("-O1", "-std=c++20"),
        ldflags=("-Wl,-soname,libcuda.so.1",),  # the name by which launches.cpp finds the driver
        include_folders=lambda: [HERE, headers],
    ).load()
    launches.give_tables()
    for name in RECORDED:  # products too, which product.cpp hands on elsewhere
        torch.ops.bi_compile_cuda.take(name)
    return library


def metadata(**more: Any) -> SimpleNamespace:
    """What Triton says of a kernel that it compiled, whose launch is a plain one."""
    return SimpleNamespace(num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0, **more)


def on_device(x: Tensor) -> Tensor:
    """x's memory as a tensor on the device."""
    return torch.ops.cuda_stand_in.tensor(x)


@contextlib.contextmanager
def watched(*given: Tensor | None, capturing: bool = False) -> Iterator[Seen]:
    """What is launched inside. given: tensors that a launch may point to; what else it points to must have been allocated inside.
    capturing: as while a CUDA graph is captured."""
    seen = Seen()
    addresses = {x.data_ptr() for x in given if x is not None}

    def named(pointer: int) -> Any:
        if pointer == 0:
            return None
        with _disable_current_modes():  # it is no part of what runs
            return ("at", pointer) if pointer in addresses else ("room", torch.ops.cuda_stand_in.bytes_at(pointer))

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **meta: Any) -> Any:
        compiled = _compile(kernel, args, meta)
        arguments: list[Any] = []
        for a, kind in zip(args, compiled.src.signature.values(), strict=False):
            if isinstance(a, TensorDescriptor):
                arguments += _described(a, named)
            elif kind != "constexpr":
                arguments.append(named(a.data_ptr()) if isinstance(a, Tensor) else a)
        seen.python.append(
            Launch(compiled.what, grid[0], 32 * compiled.metadata.num_warps, compiled.metadata.shared, tuple(arguments))
        )
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(matmul_tma, "_hopper_multiprocessors", lambda device: 132)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        torch.ops.cuda_stand_in.capture(capturing)
        yield seen
        raw = torch.ops.cuda_stand_in.launches()
    while raw:
        (function, programs, threads, shared, count), raw = raw[:5], raw[5:]
        values, raw = raw[:count], raw[count:]
        compiled = _functions[function]
        arguments: list[Any] = []
        for kind in compiled.kinds:
            here, values = values[: WORDS.get(kind, 1)], values[WORDS.get(kind, 1) :]
            if kind == "fp32":
                here = struct.unpack("<f", struct.pack("<i", *here))
            arguments += [named(here[0]), *here[1:]] if kind.startswith("*") or kind == "map" else here
        assert len(values) == SCRATCH and not any(values), "scratch that is not null"
        seen.cpp.append(Launch(compiled.what, programs, threads, shared, tuple(arguments)))


def _described(x: TensorDescriptor, named: Callable[[int], Any]) -> list[Any]:
    """A tensor map as driver.cpp writes it down, and what Triton passes behind it."""
    rows, columns = x.shape
    kind = {torch.float16: 6, torch.bfloat16: 9}[x.base.dtype]
    promotion = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
    numbers = [kind, 2, columns, rows, 2 * x.strides[0], *x.block_shape[::-1], 1, 1, 0, SWIZZLE, promotion, 0]
    return [named(x.base.data_ptr()), *numbers, 0, 0, *x.shape, *x.strides]


_compilations: dict[str, _Compiled] = {}
_functions: dict[int, _Compiled] = {}


def _compile(kernel: Any, args: tuple[Any, ...], meta: Mapping[str, Any]) -> _Compiled:
    """What Triton would have compiled for this call: types, alignment of pointers, ones and multiples of 16 make a difference."""
    signature: dict[str, str] = {}
    special: dict[str, Any] = {}
    for parameter, arg in zip(kernel.params, args, strict=False):
        name = parameter.name
        signature[name], special[name] = _type(
            arg, parameter.do_not_specialize, parameter.do_not_specialize_on_alignment
        )
    signature |= dict.fromkeys(set(kernel.arg_names) - set(signature), "constexpr")
    what = f"{kernel.__name__} {signature} {special} {sorted((k, str(v)) for k, v in meta.items())}"
    if what not in _compilations:
        kinds: list[str] = []
        for kind in signature.values():
            kinds += DESCRIPTOR if kind.startswith("tensordesc") else [kind] * (kind != "constexpr")
        sizes = [128 if kind == "map" else 8 if kind.startswith("*") or kind == "i64" else 4 for kind in kinds]
        function = torch.ops.cuda_stand_in.kernel([*sizes, *[8] * SCRATCH])
        descriptors = [
            {"swizzle": SWIZZLE, "block_size": each.block_shape, "fp4_padded": False}
            for each in args
            if isinstance(each, TensorDescriptor)
        ]
        plan = metadata(num_warps=meta["num_warps"], shared=1000 + function, tensordesc_meta=descriptors)
        made = _Compiled(what, function, tuple(kinds), SimpleNamespace(signature=signature), plan)
        _compilations[what] = _functions[function] = made
    return _compilations[what]


def _type(arg: Any, plain: bool, unaligned: bool) -> tuple[str, Any]:
    """Triton's type of an argument, and what it is specialized for."""
    if arg is None:
        return "constexpr", None
    if isinstance(arg, TensorDescriptor):
        return f"tensordesc<{arg.base.dtype}{arg.block_shape}>", None
    if isinstance(arg, float):
        return "fp32", None
    if isinstance(arg, Tensor):
        return f"*{arg.dtype}", not unaligned and arg.data_ptr() % 16 == 0
    if not plain and arg == 1:
        return "constexpr", 1
    return "i32" if -(2**31) <= arg < 2**31 else "i64", not plain and arg % 16 == 0
