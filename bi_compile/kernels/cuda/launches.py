"""What a function in Triton launched, told to the C++ operators of `rows.cpp` and `attention.cpp`, which launch it from then on.

A Triton kernel is compiled for dtypes, alignment and strides; of what it is given, pointers and the numbers for which it is not
specialized alone change with the batch. So the kernel that one call has compiled is the one for every call of the same layout, and C++
can launch its binary: the same kernel, so the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..triton import norm, paged_attention, reduce
from ..triton.launch import Launched, watching
from ..triton.running_softmax import ends_of_segments
from ..triton.tiles import ATTENTION, ATTENTION_HEAD, FEW, MANY

log = logging.getLogger("bi_compile")
SLOT, NUMBER, CONSTANT, MAP = range(4)
#: numbers in a `Key` in launches.h
KEY = 24
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u32": 4, "u64": 8, "fp32": 4}
#: bytes of a CUtensorMap, and numbers that describe it to C++
_MAP, _MATRIX = 128, 9
_kept: dict[int, Any] = {}
"""What Triton compiled: it unloads what nothing holds, and C++ launches these by their handles."""
#: of CUtensorMapDataType
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}


def described(launched: Launched, slot_of: Callable[[int, Tensor], int | None], exact: bool) -> list[int]:
    """A launch as `launch_of` in launches.cpp takes it: function, threads, bytes of shared memory, programs, number of arguments; of each
    argument kind, value and bytes; of each descriptor its map.

    slot_of: which of the tensors that C++ will pass an argument of the kernel is, given its place. exact: everything but the tensors will be
    as it was; else the kernel's `do_not_specialize` are numbers that C++ will pass.

    Raises:
        ValueError: the kernel was given another tensor, a copy, or has an argument of a type, or is launched in a way, that is not known here.
    """
    plan = launched.compiled.metadata
    scratch = plan.global_scratch_size or getattr(plan, "profile_scratch_size", 0)
    if plan.num_ctas != 1 or plan.launch_cooperative_grid or plan.launch_pdl or scratch:
        raise ValueError("it is no plain launch")
    found: list[tuple[int, int, int]] = []
    maps: list[int] = []
    descriptors = iter(getattr(plan, "tensordesc_meta", None) or ())
    for index, (name, given) in enumerate(zip(launched.kernel.arg_names, launched.args, strict=False)):
        kind = str(launched.compiled.src.signature[name])
        if kind == "constexpr":  # compiled in
            continue
        descriptor = kind.startswith("tensordesc")
        if descriptor or kind.startswith("*"):
            slot = slot_of(index, given.base if descriptor else given)
            if slot is None:
                raise ValueError(f"{name} is not what the operator was given")
            if descriptor:
                found.append((MAP, len(maps) // _MATRIX, _MAP))
                found += [(CONSTANT, n, 4) for n in given.shape] + [(CONSTANT, n, 8) for n in given.strides]
                maps += _map(name, slot, given, next(descriptors, None))
            else:
                found.append((SLOT, slot, 8))
        elif kind not in _SIZES:
            raise ValueError(f"{name} has Triton's type {kind}")
        elif name in launched.kernel.do_not_specialize and not exact:
            found.append((NUMBER, launched.kernel.do_not_specialize.index(name), _SIZES[kind]))
        elif kind == "fp32":
            # Triton's launcher rounds to infinity what is too large for a float
            found.append((CONSTANT, ctypes.c_int32.from_buffer(ctypes.c_float(given)).value, 4))
        else:
            found.append((CONSTANT, int(given), _SIZES[kind]))
    _kept[id(launched.compiled)] = launched.compiled
    head = launched.compiled.function, 32 * plan.num_warps, plan.shared, launched.programs, len(found)
    return [*head, *itertools.chain.from_iterable(found), *maps]


def _map(name: str, slot: int, descriptor: Any, plan: Any) -> list[int]:
    """A `Matrix` of launches.cpp: how Triton encodes a descriptor. plan: what its compiler says of it; None where it takes it apart."""
    kind = _MAP_TYPES.get(descriptor.base.dtype)
    if plan is None or kind is None or len(descriptor.shape) != 2 or descriptor.padding != "zero" or plan["fp4_padded"]:
        raise ValueError(f"{name} is a descriptor that is not encoded here")
    address, (stride, _) = descriptor.base.data_ptr(), descriptor.strides
    return [slot, address, kind, plan["swizzle"], *descriptor.shape, stride, *plan["block_size"]]


def _learn(key: Sequence[int], launched: Launched, slots: Sequence[Tensor | None], rows: int) -> None:
    """Tell C++ what this call launched, where that is a plain kernel over the tensors themselves: `slots`, in the order of the kernel's first
    arguments. rows: what a program takes of them."""

    def slot_of(index: int, given: Tensor) -> int | None:
        slot = slots[index] if index < len(slots) else None
        return None if slot is None or given.data_ptr() != slot.data_ptr() else index

    try:
        torch.ops.bi_compile_cuda.learn(list(key), rows, described(launched, slot_of, exact=False))
    except ValueError as error:
        log.debug("bi_compile: %s keeps its launch in Python: %s", launched.kernel.__name__, error)
    except RuntimeError as error:
        warn_of(launched.kernel.__name__, str(error).partition("\n")[0])


@functools.cache
def warn_of(name: str, why: str) -> None:
    """Say once that C++ cannot launch something that it ought to."""
    log.warning("bi_compile: %s is called from Python, with the same bits and more of the host's time: %s", name, why)


def _learn_rows(key: Sequence[int], seen: Sequence[Launched], slots: Sequence[Tensor | None]) -> None:
    if key and len(seen) == 1:
        _learn(key, seen[0], slots, seen[0].meta["BLOCK_R"])


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, key: Sequence[int]) -> tuple[Tensor, Tensor]:
    with watching() as seen:
        y, rstd = norm.rms_norm(x, weight, eps)
    _learn_rows(key, seen, [x, None, weight, y, rstd, None])
    return y, rstd


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, key: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    with watching() as seen:
        y, rstd, s = norm.add_rms_norm(x, residual, weight, eps)
    _learn_rows(key, seen, [x, residual, weight, y, rstd, s])
    return y, rstd, s


def qk_norm(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, q_heads: int, k_heads: int, eps: float, key: Sequence[int]
) -> tuple[Tensor, Tensor]:
    with watching() as seen:
        q, k = norm.qk_norm(qkv, q_weight, k_weight, q_heads, k_heads, eps)
    _learn_rows(key, seen, [qkv, q_weight, k_weight, q, k])
    return q, k


def _along(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, dim: int, dtype: torch.dtype | None, key: Sequence[int]) -> Tensor:
        with watching() as seen:
            out = function(x, dim, dtype=dtype)
        _learn_rows(key, seen, [x, out])
        return out

    return run


def _over(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype | None, key: Sequence[int]) -> Tensor:
        with watching() as seen:
            out = function(x, dim, keepdim, dtype=dtype)
        _learn_rows(key, seen, [x, out])
        return out

    return run


def fill_paged(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, counts: Tensor, table: Tensor, scale: float, left: int, right: int,
    longest: int, most: int, keys: Sequence[int] = (),
) -> None:  # fmt: skip
    """`paged_attention.fill` without the logsumexp. left -1: all keys before a query. longest, most: no request has more queries (0: unknown),
    or keys, and a graph that is captured has room for the keys that the table holds. keys: of the launches, one behind the other, and of the
    join."""
    outs = out, q.new_empty(q.shape[:-1], dtype=torch.float32)
    if torch.cuda.is_current_stream_capturing():
        most = table.shape[1] * k.shape[1]
    with watching() as seen:
        paged_attention.fill(
            outs, q, k, v, ends, counts, table,
            scale=scale, left=None if left < 0 else left, right=right, longest=longest or None, most=most,
        )  # fmt: skip
    if not keys or not seen:
        return
    *each, join = (list(keys[i : i + KEY]) for i in range(0, len(keys), KEY))
    partial = seen[0].args[10]
    for key, launched in zip(each, seen, strict=False):
        key[1] = partial is not None
        _learn(key, launched, [q, k, v, q, k, ends, counts, table, *outs, partial], launched.meta["BLOCK_M"])
    if partial is not None:
        _learn(join, seen[-1], [partial, *outs], 1)


def give_tables() -> None:
    """What `attention.cpp` chooses tiles and parts by."""
    limits = [limit for limit, _ in ATTENTION["cuda"][2]]
    torch.ops.bi_compile_cuda.attention_tables(limits, ends_of_segments(2**20), FEW, MANY, ATTENTION_HEAD["cuda"][1])


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "triton_fill_paged": fill_paged,
    "triton_rms_norm": rms_norm,
    "triton_add_rms_norm": add_rms_norm,
    "triton_qk_norm": qk_norm,
    "triton_softmax": _along(reduce.softmax),
    "triton_log_softmax": _along(reduce.log_softmax),
    "triton_sum": _over(reduce.sum),
    "triton_mean": _over(reduce.mean),
}
