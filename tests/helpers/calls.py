"""Calls of the ATen operators that passes replace, a family at a time: layouts, dimensions, sizes, and what is optional."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from support import Call, rand

from bi_compile.table import find_operator

#: the size that becomes a symbol in the tests of symbolic shapes, and a second one; nothing else has them
BATCH, OTHER = 5, 11
Case = tuple[str, tuple[Any, ...], dict[str, Any]]


def dims_of(rank: int) -> list[Any]:
    return [0, -1, [0], [-1], [1], list(range(rank)), [-1, 0], None, []]


def reductions(dtype: torch.dtype, n: int) -> Iterator[Case]:
    x = rand(n, 7, 6, dtype=dtype)
    permuted = rand(6, 7, n, dtype=dtype).permute(2, 1, 0)
    scalar, empty, hollow = rand(dtype=dtype), rand(0, 6, dtype=dtype), rand(n, 0, dtype=dtype)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    for name in ("sum", "mean"):
        yield f"aten.{name}.default", (x,), {}
        yield f"aten.{name}.default", (scalar,), {}
        yield f"aten.{name}.default", (x,), {"dtype": wider}
        yield f"aten.{name}.default", (hollow,), {}
        overload = {"sum": "aten.sum.dim_IntList", "mean": "aten.mean.dim"}[name]
        for dim in dims_of(3):
            yield overload, (x, dim if dim is None or isinstance(dim, list) else [dim]), {}
            yield overload, (permuted, dim if dim is None or isinstance(dim, list) else [dim], True), {}
        yield overload, (x, [1], False), {"dtype": wider}
        yield overload, (x, [-2, 2], True), {"dtype": torch.float64}
        for tensor, dim in (
            (scalar, None),
            (scalar, []),
            (scalar, [0]),
            (scalar, [-1]),
            (empty, [0]),
            (empty, [1]),
            (hollow, [1]),
        ):
            yield overload, (tensor, dim), {}
    holes = torch.where(x > 1, torch.nan, x)
    yield "aten.nansum.default", (holes,), {}
    for dim in ([0], [-1, 0], None):
        yield "aten.nansum.default", (holes, dim, True), {}
    yield "aten.nansum.default", (holes, [1]), {"dtype": wider}
    yield "aten.nansum.default", (scalar, None), {}
    for name in ("var_mean", "std_mean", "var", "std"):
        op = f"aten.{name}.correction"
        yield op, (x,), {}
        for dim in dims_of(3):
            yield op, (x, dim if dim is None or isinstance(dim, list) else [dim]), {"keepdim": dim in ([0], None)}
        for correction in (0, 1, 2, 0.5, None):
            yield op, (permuted, [1]), {"correction": correction}
        yield op, (rand(4, 1, dtype=dtype), [1]), {"correction": 0}
        yield op, (scalar, None), {"correction": 0}
        yield op, (empty, [1]), {}
    for p in (2, 1, 0, 3, 0.5, -1, float("inf"), float("-inf")):
        yield "aten.linalg_vector_norm.default", (x, p, [-1]), {}
        yield "aten.linalg_vector_norm.default", (permuted, p, [0, 2], True), {}
        yield "aten.linalg_vector_norm.default", (x, p, None), {}
        yield "aten.norm.ScalarOpt_dim", (x, p, [1], True), {}
        yield "aten.norm.Scalar", (x, p), {}
    yield "aten.linalg_vector_norm.default", (x,), {}
    yield "aten.linalg_vector_norm.default", (x, 2, []), {}
    yield "aten.linalg_vector_norm.default", (scalar, 2, None), {}
    yield "aten.linalg_vector_norm.default", (scalar, 3, None, True), {}
    yield "aten.linalg_vector_norm.default", (empty, 2, [0]), {}
    yield "aten.norm.ScalarOpt_dim", (x, None, [1]), {}
    yield "aten.norm.ScalarOpt_dim", (x, 2, []), {}
    yield "aten.norm.ScalarOpt_dim", (x, 2, [-1, 0]), {}
    if torch.promote_types(dtype, wider) == wider:
        yield "aten.linalg_vector_norm.default", (x, 2, [1]), {"dtype": wider}
        yield "aten.norm.ScalarOpt_dim_dtype", (x, 2, [1], False), {"dtype": wider}
        yield "aten.norm.ScalarOpt_dim_dtype", (x, None, [-1, 0], True), {"dtype": wider}
    for dim in ([0], [-1], [1, 2], [-1, 0]):
        yield "aten.logsumexp.default", (x, dim), {}
        yield "aten.logsumexp.default", (permuted, dim, True), {}
    yield "aten.logsumexp.default", (torch.full((3, 4), -torch.inf, dtype=dtype), [1]), {}
    yield "aten.logsumexp.default", (scalar, [0]), {}
    yield "aten.logsumexp.default", (empty, [1]), {}
    for dim in (0, 1, -1):
        yield "aten.cumsum.default", (x, dim), {}
        yield "aten.cumsum.default", (permuted, dim), {}
    yield "aten.cumsum.default", (x, 1), {"dtype": wider}
    yield "aten.cumsum.default", (scalar, 0), {}
    yield "aten.cumsum.default", (empty, 0), {}


def softmaxes(dtype: torch.dtype, n: int) -> Iterator[Case]:
    x = rand(n, 7, 6, dtype=dtype)
    permuted = rand(6, 7, n, dtype=dtype).permute(2, 1, 0)
    dead = torch.where(torch.arange(6) < 9, -torch.inf, x)
    for name in ("_softmax", "_log_softmax"):
        for dim in (0, 1, 2, -1, -3):
            yield f"aten.{name}.default", (x, dim, False), {}
        yield f"aten.{name}.default", (permuted, 1, False), {}
        yield f"aten.{name}.default", (rand(dtype=dtype), 0, False), {}
        yield f"aten.{name}.default", (rand(dtype=dtype), -1, False), {}
        yield f"aten.{name}.default", (rand(0, 4, dtype=dtype), 1, False), {}
        yield f"aten.{name}.default", (rand(4, 0, dtype=dtype), 1, False), {}
    for dim in (0, -1):
        yield "aten._safe_softmax.default", (x, dim), {}
        yield "aten._safe_softmax.default", (dead, dim), {}
    yield "aten._safe_softmax.default", (x, -1, torch.float64), {}
    yield "aten._safe_softmax.default", (dead, -1, torch.float32), {}


def norms(dtype: torch.dtype, n: int) -> Iterator[Case]:
    x = rand(n, 7, 6, dtype=dtype)
    permuted = rand(6, 7, n, dtype=dtype).permute(2, 1, 0)
    for shape in ([6], [7, 6], [n, 7, 6]):
        w, b = rand(*shape, dtype=dtype, seed=1), rand(*shape, dtype=dtype, seed=2)
        for weight, bias in ((w, b), (w, None), (None, b), (None, None)):
            yield "aten.native_layer_norm.default", (x, shape, weight, bias, 1e-5), {}
        yield "aten._fused_rms_norm.default", (x, shape, w, 1e-5), {}
        yield "aten._fused_rms_norm.default", (x, shape, None, None), {}
    yield "aten.native_layer_norm.default", (permuted, [6], None, None, 1e-5), {}
    yield "aten.native_layer_norm.default", (rand(0, 6, dtype=dtype), [6], None, None, 1e-5), {}
    yield "aten._fused_rms_norm.default", (permuted, [6], None, 1e-5), {}
    image = rand(n, 8, 3, 2, dtype=dtype)
    w, b = rand(8, dtype=dtype, seed=1), rand(8, dtype=dtype, seed=2)
    for groups in (1, 2, 8):
        yield "aten.native_group_norm.default", (image, w, b, n, 8, 6, groups, 1e-5), {}
    yield "aten.native_group_norm.default", (image, None, None, n, 8, 6, 4, 1e-5), {}
    yield (
        "aten.native_group_norm.default",
        (image.contiguous(memory_format=torch.channels_last), w, b, n, 8, 6, 4, 1e-5),
        {},
    )
    yield "aten.native_group_norm.default", (rand(n, 8, dtype=dtype), w, None, n, 8, 1, 4, 1e-5), {}


def products(dtype: torch.dtype, n: int) -> Iterator[Case]:
    a, b, c = rand(n, 7, dtype=dtype), rand(7, 6, dtype=dtype, seed=1), rand(n, 6, dtype=dtype, seed=2)
    p, q, r = rand(n, 3, 7, dtype=dtype), rand(n, 7, 6, dtype=dtype, seed=1), rand(n, 3, 6, dtype=dtype, seed=2)
    v, w = rand(7, dtype=dtype, seed=3), rand(n, dtype=dtype, seed=4)
    yield "aten.mm.default", (a, b), {}
    yield "aten.mm.default", (rand(7, n, dtype=dtype).t(), rand(6, 7, dtype=dtype).t()), {}
    yield "aten.mm.default", (rand(0, 7, dtype=dtype), b), {}
    yield "aten.mm.default", (rand(n, 0, dtype=dtype), rand(0, 6, dtype=dtype)), {}
    for bias in (c, c[0], c[:, :1], c[0, 0], c[:1]):
        yield "aten.addmm.default", (bias, a, b), {}
    yield "aten.addmm.default", (c, a, b), {"beta": 0.5, "alpha": 2}
    yield "aten.addmm.default", (torch.full_like(c, torch.nan), a, b), {"beta": 0}
    yield "aten.addmm.default", (c, rand(n, 0, dtype=dtype), rand(0, 6, dtype=dtype)), {"beta": 0.5}
    yield "aten.bmm.default", (p, q), {}
    yield "aten.bmm.default", (p, rand(n, 6, 7, dtype=dtype).transpose(1, 2)), {}
    yield "aten.bmm.default", (rand(0, 3, 7, dtype=dtype), rand(0, 7, 6, dtype=dtype)), {}
    for bias in (r, r[0], r[:, :1], r[0, 0]):
        yield "aten.baddbmm.default", (bias, p, q), {}
    yield "aten.baddbmm.default", (r, p, q), {"beta": 0.5, "alpha": 2}
    yield "aten.baddbmm.default", (torch.full_like(r, torch.nan), p, q), {"beta": 0}
    if dtype == torch.bfloat16:
        ends = torch.tensor([2, 2, n], dtype=torch.int32)
        yield "aten._grouped_mm.default", (rand(n, 8, dtype=dtype), rand(3, 8, 16, dtype=dtype), ends), {}
        columns = rand(3, 16, 8, dtype=dtype).transpose(1, 2)
        yield "aten._grouped_mm.default", (rand(n, 8, dtype=dtype), columns, ends), {"out_dtype": dtype}
        yield "aten._grouped_mm.default", (rand(n, 5, 8, dtype=dtype), rand(n, 8, 16, dtype=dtype)), {}
    if dtype != torch.bfloat16:  # PyTorch rounds to it after each product of the batch
        yield "aten.addbmm.default", (r[0], p, q), {}
        yield "aten.addbmm.default", (r[0, 0], p, q), {"beta": 0.5, "alpha": 2}
        yield "aten.addbmm.default", (r[0], rand(0, 3, 7, dtype=dtype), rand(0, 7, 6, dtype=dtype)), {}
    yield "aten.mv.default", (a, v), {}
    yield "aten.mv.default", (rand(0, 7, dtype=dtype), v), {}
    yield "aten.addmv.default", (w, a, v), {}
    yield "aten.addmv.default", (w[:1], a, v), {"beta": 0.5, "alpha": 2}
    yield "aten.addmv.default", (w[0], a, v), {}
    yield "aten.dot.default", (v, rand(7, dtype=dtype, seed=5)), {}
    yield "aten.dot.default", (rand(0, dtype=dtype), rand(0, dtype=dtype)), {}
    weight = rand(6, 7, dtype=dtype, seed=1)
    for x in (v, a, p, p[:, None], rand(0, 7, dtype=dtype), p.transpose(0, 1)):
        yield "aten.linear.default", (x, weight), {}
        yield "aten.linear.default", (x, weight, rand(6, dtype=dtype, seed=2)), {}
    yield "aten.linear.default", (a, v), {}
    pairs = (
        (v, v), (a, v), (v, b), (a, b), (p, v), (v, q), (p, b), (a, q), (p, q), (p[:, None], q), (p, q[:, None]),
        (p[:1], q), (p, q[:1]), (v, q[:, None]),
        (rand(0, 7, dtype=dtype), b), (rand(0, 3, 7, dtype=dtype), b), (p.transpose(0, 1), b),
    )  # fmt: skip
    for x, y in pairs:
        yield "aten.matmul.default", (x, y), {}


def attentions(dtype: torch.dtype, n: int) -> Iterator[Case]:
    q, k, v = (rand(n, 4, length, 8, dtype=dtype, seed=length) for length in (6, 9, 9))
    few = rand(n, 2, 9, 8, dtype=dtype, seed=1)
    mask = rand(6, 9) > 0
    mask[:, 0] = True
    sdpa = "aten.scaled_dot_product_attention.default"
    yield sdpa, (q, k, v), {}
    yield sdpa, (q, k, v), {"is_causal": True}
    yield sdpa, (q, k, v), {"scale": 0.3}
    yield sdpa, (q, k, v, mask), {}
    yield sdpa, (q, k, v, mask.expand(n, 1, 6, 9)), {}
    yield sdpa, (q, k, v, rand(n, 4, 6, 9, dtype=dtype)), {}
    yield sdpa, (q, few, few), {"enable_gqa": True}
    yield sdpa, (q[0], k[0], v[0]), {}
    yield sdpa, (q[0], k[0], v[0], mask), {}
    yield sdpa, (q[0, 0], k[0, 0], v[0, 0]), {}
    yield sdpa, (q[None], k[None], v[None], mask), {}
    yield sdpa, (q[0, 0], k[0, 0], v[0, 0], mask), {}
    yield sdpa, (q, k[0], v[:1], mask), {}
    yield sdpa, (q, k[:, :1], v[:, :1]), {}
    yield sdpa, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {}
    yield sdpa, (q, k, rand(n, 4, 9, 3, dtype=dtype)), {}
    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    yield flash, (q, k, v), {}
    yield flash, (q, k, v, 0.0, True), {"scale": 0.3}
    yield flash, (q, k, v), {"attn_mask": rand(n, 1, 6, 9, dtype=dtype)}


def convolutions(dtype: torch.dtype, n: int) -> Iterator[Case]:
    op = "aten.convolution.default"
    for places in ([3], [3, 2], [2, 1, 3]):
        one = [1] * len(places)
        x, w, b = (
            rand(n, 4, *[9, 7, 6][: len(places)], dtype=dtype),
            rand(6, 4, *places, dtype=dtype),
            rand(6, dtype=dtype),
        )
        yield op, (x, w, b, one, [0], one, False, [0], 1), {}
        yield op, (x, w, None, [2], one, [2], False, [0], 1), {}
        yield op, (x, w[:, :2], b, one, one, one, False, [0], 2), {}
        yield op, (x, w[:4, :1], None, [2], one, one, False, [0], 4), {}
        yield op, (x, rand(4, 3, *places, dtype=dtype), b, [2], one, one, True, one, 2), {}
        yield op, (x, rand(4, 3, *places, dtype=dtype), None, one, [2], [2], True, [0], 1), {}
        yield op, (rand(0, 4, *x.shape[2:], dtype=dtype), w, b, one, [0], one, False, [0], 1), {}
    image = rand(n, 4, 9, 8, dtype=dtype)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    yield op, (channels_last, rand(6, 4, 3, 3, dtype=dtype), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {}
    for x in (image, image[0], channels_last):
        yield "aten.avg_pool2d.default", (x, [3]), {}
        yield "aten.avg_pool2d.default", (x, [3, 2], [2, 1], [1, 0]), {}
        yield "aten.avg_pool2d.default", (x, [3, 2], [2, 1], [1, 1], False, False), {}
        yield "aten.avg_pool2d.default", (x, [3, 3], [1], [1], False, True, 3), {}
        for size in ([2, 3], [9, 8], [12, 7]):
            yield "aten._adaptive_avg_pool2d.default", (x, size), {}
    yield "aten._adaptive_avg_pool2d.default", (image, [1, 1]), {}
    if dtype in (torch.float32, torch.float64):
        yield "aten.avg_pool3d.default", (rand(n, 2, 6, 7, 4, dtype=dtype), [2], [2], [1], False, False), {}
    yield "aten._adaptive_avg_pool3d.default", (rand(n, 2, 6, 7, 4, dtype=dtype), [2, 2, 3]), {}


FAMILIES = {f.__name__: f for f in (reductions, softmaxes, norms, products, attentions, convolutions)}


def calls(family: str, dtype: torch.dtype, n: int = BATCH) -> list[Call]:
    return [(find_operator(name), args, kwargs) for name, args, kwargs in FAMILIES[family](dtype, n)]
