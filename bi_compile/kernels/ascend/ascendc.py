"""AscendC operators of the package `batch_invariant_ops`, which take precedence over the Triton kernels where it is installed.

They are those that vllm-ascend (batch_invariant.py, August 2026) and SGLang take from it, and are called as they call them. Where an
argument goes beyond that (a dtype, several dimensions, another dimension than the last), the Triton kernel stays.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import HostError

#: what theirs takes: half precisions and float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: AscendC operators of the package `batch_invariant_ops`, by the operator of ours that each serves
ASCENDC = {
    "mm": "npu_mm_batch_invariant",
    "bmm": "npu_matmul_batch_invariant",
    "bmm_transposed": "npu_matmul_batch_invariant",
    "sum": "npu_reduce_sum_batch_invariant",
    "mean": "npu_reduce_mean_batch_invariant",
    "log_softmax": "npu_log_softmax_batch_invariant",
}
#: its attention, which has the arguments of `torch_npu.npu_fused_infer_attention_score`, and the form `.out`
ATTENTION = "npu_fused_infer_attention_score_batch_invariant"


def ascendc_operators() -> dict[str, Callable[..., object]]:
    """`ASCENDC`, looked up; empty where the package is not installed.

    Raises:
        HostError: the package is there and lacks one of them, or the attention.
    """
    if importlib.util.find_spec("batch_invariant_ops") is None:
        return {}
    import batch_invariant_ops  # noqa: F401  registers torch.ops.batch_invariant_ops

    missing = [
        name
        for name in dict.fromkeys((*ASCENDC.values(), ATTENTION))
        if not hasattr(torch.ops.batch_invariant_ops, name)
    ]
    if missing:
        raise HostError(
            f"the package batch_invariant_ops lacks {', '.join(missing)}: install its current release (for Ascend 950: 2.0.0 or "
            "newer), or uninstall it to use the Triton kernels"
        )
    return {ours: getattr(torch.ops.batch_invariant_ops, theirs) for ours, theirs in ASCENDC.items()}


@functools.cache
def attention() -> Any | None:
    """AscendC's attention (a packet with `default` and `out`); None where the package is not installed.

    Raises:
        HostError: as `ascendc_operators` does.
    """
    return getattr(torch.ops.batch_invariant_ops, ATTENTION) if ascendc_operators() else None


def serves() -> dict[str, str]:
    """What the NPU's kernels rest on, for the log and certificates: the package, and the operators that it serves."""
    if not ascendc_operators():
        return {"batch_invariant_ops": "not installed: Triton kernels serve every operator"}
    try:
        version = importlib.metadata.version("batch_invariant_ops")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return {"batch_invariant_ops": f"{version}: serves {', '.join([*ASCENDC, ATTENTION])}"}


def into(out: Sequence[Tensor], attention: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The results of `npu_fused_infer_attention_score.out`, put where it was told."""
    for to, result in zip(out, (attention, lse), strict=True):
        if to is not result:
            to.copy_(result.reshape(to.shape))
    return out[0], out[1]


def each_phase(
    theirs: Any, query: Tensor, key: Tensor, value: Tensor, out: Sequence[Tensor] | None = None, /, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """AscendC's attention (layout TND), called apart for requests of one token and of more.

    vllm-ascend's users found that prefill and decode in one call change each other. In vllm-ascend's order, decodes first, there
    are at most two calls. A workspace is left to it: the caller's was measured for another operator.
    """
    arguments.pop("workspace", None)
    ends, keys = list(arguments["actual_seq_lengths"]), list(arguments["actual_seq_lengths_kv"])
    table = arguments.get("block_table")
    counts = [end - start for start, end in itertools.pairwise([0, *ends])]
    phases = [len(list(run)) for _, run in itertools.groupby(counts, lambda n: n > 1)]
    if len(phases) < 2:
        if out is None:
            return theirs.default(query, key, value, **arguments)
        return theirs.out(query, key, value, **arguments, workspace=None, out=out)
    parts, i = [], 0
    for j in itertools.accumulate(phases):
        first, first_key = ((x[i - 1] if i else 0) for x in (ends, keys))
        last = ends[j - 1] if j < len(ends) else query.shape[0]
        own = arguments | {"actual_seq_lengths": [end - first for end in ends[i:j]]}
        if table is not None:
            own |= {"block_table": table[i:j], "actual_seq_lengths_kv": keys[i:j]}
            k, v = key, value
        else:
            own |= {"actual_seq_lengths_kv": [end - first_key for end in keys[i:j]]}
            k, v = key[first_key : keys[j - 1]], value[first_key : keys[j - 1]]
        parts.append(theirs.default(query[first:last], k, v, **own))
        i = j
    ys, lses = zip(*parts, strict=True)
    if arguments.get("softmax_lse_flag"):
        lse = torch.cat(lses)
    else:
        lse = lses[0] if out is None else out[1]
    return (torch.cat(ys), lse) if out is None else into(out, torch.cat(ys), lse)


def _mm(theirs: Callable[..., Any], ours: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    return theirs(a, b) if a.dtype in DTYPES and a.numel() and b.numel() else ours(a, b)


def _transposed(theirs: Callable[..., Any], ours: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    return _mm(lambda a, b: theirs(a, b).transpose(0, 1).contiguous(), ours, a, b)


def _reduce(
    theirs: Callable[..., Any],
    ours: Callable[..., Any],
    x: Tensor,
    dim: list[int],
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    """Theirs takes one dimension, as an integer; vllm-ascend moves every other one to the end before it calls it."""
    last = dim in ([-1], [x.dim() - 1]) and x.dim() > 0
    fits = last and dtype in (None, x.dtype) and x.dtype in DTYPES and x.numel()
    return theirs(x, -1, keepdim) if fits else ours(x, dim, keepdim, dtype=dtype)


def _log_softmax(
    theirs: Callable[..., Any], ours: Callable[..., Any], x: Tensor, dim: int, *, dtype: Any = None
) -> Tensor:
    fits = dtype in (None, x.dtype) and x.dtype in DTYPES and x.numel()
    return theirs(x, dim=dim).contiguous() if fits else ours(x, dim, dtype=dtype)


_CALLS: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "bmm": _mm,
    "bmm_transposed": _transposed,
    "sum": _reduce,
    "mean": _reduce,
    "log_softmax": _log_softmax,
}


def preferred(kernels: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """`kernels`, those that AscendC has replaced by it; the same ones where the package is not installed.

    Raises:
        HostError: the package is there and lacks an operator that is needed.
    """
    theirs = ascendc_operators()
    return kernels | {name: functools.partial(_CALLS[name], op, kernels[name]) for name, op in theirs.items()}
