"""Small functions of rows, each with one variant operator hidden in it in another way, and as many without one.

Each is called with x [ROWS, 12] and w [12, 12] and returns rows along dimension 0, as many as x has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

ROWS = 6
Function = Callable[[Tensor, Tensor], Any]
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Hole:
    """A function that is not batch-invariant."""

    f: Function
    operator: str
    """What has to be named, or the beginning of it."""
    bits: bool = True
    """Whether other rows change its bits: not where the result is of integers, or too few numbers are added up."""
    how: str = "traced"
    """"traced" as one graph, "compiled" by Dynamo into one or several, or "eager": in no graph at all."""


def _three(x: Tensor) -> Tensor:
    """[R, 12] as [R, 1, 3, 4]."""
    return x.view(-1, 1, 3, 4)


def _attends(x: Tensor, keys: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(_three(x), keys, keys).flatten(1)


def _product_out(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w, out=x.new_empty(x.shape[0], w.shape[1]))


def _experts(x: Tensor, w: Tensor, spoiled: str = "") -> Tensor:
    """Each row times one of three matrices, the rows sorted for it and put back, as transformers writes a mixture of experts."""
    experts = (x[:, 0].abs() * 3).long() % 3
    keys, order = torch.sort(experts, descending=spoiled == "descending")
    least = 1 if spoiled == "counted from one" else 0
    ends = torch.histc(keys.float(), bins=3, min=least, max=least + 2).cumsum(0, dtype=torch.int32)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    wide = torch.cat([w, w[:, :4]], 1)
    matrix = torch.cat([wide, wide[:4]]).bfloat16()  # the operator takes rows of a multiple of 16 bytes
    rows, weights = torch.cat([x, x[:, :4]], 1).bfloat16(), torch.stack([matrix, 2 * matrix, 3 * matrix])
    y = F.silu(torch._grouped_mm(rows[order // 1], weights, offs=ends))
    y = y * (x[:, 1:2] if spoiled == "unsorted factor" else x[order][:, 1:2])
    if spoiled == "counts":
        y = y + ends[0]
    return y if spoiled == "not put back" else y[order if spoiled == "the same order twice" else back]


def _broken(x: Tensor, w: Tensor) -> Tensor:
    y = x.relu()
    torch._dynamo.graph_break()
    return y @ w


def _looped(x: Tensor, w: Tensor) -> Tensor:
    return while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, y @ w), (torch.zeros((), dtype=torch.int64), x))[1]


def _scanned(x: Tensor, w: Tensor) -> Tensor:
    start = w.new_zeros(12)
    return scan(lambda c, row: (c + row, c * row), start, x)[1]


def _flex(x: Tensor, w: Tensor) -> Tensor:
    q = x.view(-1, 1, 3, 4)
    return flex_attention(q, q, q)


def _batch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.batch_norm(x, w[0].clone(), w[1].abs().clone(), training=True)


def _index(x: Tensor) -> Tensor:
    """Each row's number, behind another one: [ROWS]."""
    return torch.arange(x.shape[0])


def _bag(x: Tensor, w: Tensor) -> Tensor:
    ids = (x.abs() * 3).long().clamp(0, 11)
    return F.embedding_bag(ids, w, mode="mean")


HOLES: dict[str, Hole] = {
    # views
    "view that merges neighbours into the reduced dimension": Hole(
        lambda x, w: x + x.view(x.shape[0] // 2, 2, 12).sum(1).repeat(2, 1), "aten.sum.dim_IntList"
    ),
    "as_strided that does": Hole(
        lambda x, w: x + torch.as_strided(x, (x.shape[0] - 1, 24), (12, 1)).sum(1).amax(), "aten.sum.dim_IntList"
    ),
    "unfold and sum over features": Hole(lambda x, w: x.unfold(1, 5, 1).sum(-1), "aten.sum.dim_IntList"),
    "unfold and sum along the batch": Hole(lambda x, w: x + x.unfold(0, 2, 1).sum(-1).amax(0), "aten.sum.dim_IntList"),
    "softmax over a transposed dimension": Hole(lambda x, w: x.t().softmax(0).t(), "aten._softmax"),
    "softmax along the batch, transposed": Hole(lambda x, w: x.t().softmax(-1).t(), "aten._softmax"),
    "non-contiguous operand": Hole(lambda x, w: x.t().contiguous().t() @ w.t(), "aten.mm"),
    # forms
    "out= of a product": Hole(_product_out, "aten.mm.out"),
    "out= of a sum": Hole(lambda x, w: torch.sum(x, 1, out=x.new_empty(x.shape[0])), "aten.sum.IntList_out"),
    "in place": Hole(lambda x, w: x.clone().cumsum_(1), "aten.cumsum_"),
    "custom operator": Hole(lambda x, w: torch.ops.somebody.mystery(x), "somebody.mystery"),
    "operator that looks like ours": Hole(lambda x, w: torch.ops.bi_compile_too.mm(x, w), "bi_compile_too.mm"),
    # outside the graph, in several graphs, and in graphs within the graph
    "graph break": Hole(_broken, "aten.mm", how="compiled"),
    "uncompiled head": Hole(lambda x, w: F.linear(x, w), "aten.mm", how="eager"),
    "cond": Hole(
        lambda x, w: torch.cond(w.amax() > 0, lambda x, w: x @ w, lambda x, w: x * 2, (x, w)), "aten.mm", how="compiled"
    ),
    "while_loop": Hole(_looped, "aten.mm", how="compiled"),
    "scan along the batch": Hole(_scanned, "scan", how="compiled"),
    "map": Hole(
        lambda x, w: torch._higher_order_ops.map(lambda row, w: (row * w).sum(-1), x, w), "aten.sum.dim_IntList", how="compiled"
    ),
    "flex_attention": Hole(_flex, "flex_attention", how="compiled"),
    # products
    "einsum": Hole(lambda x, w: torch.einsum("rk,nk->rn", x, w), "aten.bmm"),
    "tensordot": Hole(lambda x, w: torch.tensordot(x, w, dims=([1], [0])), "aten.mm"),
    "baddbmm with beta": Hole(
        lambda x, w: torch.baddbmm(x[:, None], x[:, None], w.expand(x.shape[0], 12, 12), beta=0.5), "aten.baddbmm"
    ),
    "product over the batch": Hole(lambda x, w: x + (x.t() @ x)[0], "aten.mm"),
    "grouped product": Hole(
        lambda x, w: torch._grouped_mm(x.bfloat16()[:, None].expand(-1, 16, -1).repeat(1, 1, 2)[..., :16].contiguous(), w.bfloat16().new_ones(16, 16).expand(x.shape[0], 16, 16).contiguous()),
        "aten._grouped_mm",
    ),
    "cdist": Hole(lambda x, w: torch.cdist(x, w), "aten._cdist_forward"),
    "conv1d": Hole(lambda x, w: F.conv1d(x[:, None], w[:1, None, :3]), "aten.convolution"),
    "conv2d": Hole(lambda x, w: F.conv2d(_three(x), w[:2, :4].reshape(2, 1, 2, 2)), "aten.convolution"),
    # reductions and statistics
    "cumsum over features": Hole(lambda x, w: x.cumsum(1), "aten.cumsum"),
    "variance along the batch": Hole(lambda x, w: x / x.var(0), "aten.var.correction"),
    "sort along the batch": Hole(lambda x, w: x.sort(0)[0], "aten.sort"),
    "rows left in sorted order": Hole(lambda x, w: x[x[:, 0].argsort()], "aten.sort"),
    "sorted keys": Hole(lambda x, w: x * x[:, 0].sort()[0][:, None], "aten.sort"),
    "experts not put back": Hole(lambda x, w: _experts(x, w, "not put back"), "aten.sort"),
    "experts in a wrong order": Hole(lambda x, w: _experts(x, w, "the same order twice"), "aten.sort"),
    "experts by a factor of other rows": Hole(lambda x, w: _experts(x, w, "unsorted factor"), "aten.sort"),
    "experts in descending order": Hole(lambda x, w: _experts(x, w, "descending"), "aten.sort"),
    "experts counted from one": Hole(lambda x, w: _experts(x, w, "counted from one"), "aten.sort"),
    "how many rows an expert has": Hole(lambda x, w: _experts(x, w, "counts"), "aten.sort"),
    "batch_norm that trains": Hole(_batch_norm, "aten.native_batch_norm"),
    "native_group_norm": Hole(lambda x, w: F.group_norm(x, 3), "aten.native_group_norm"),
    "logsumexp": Hole(lambda x, w: x.logsumexp(-1), "aten.logsumexp"),
    "logcumsumexp": Hole(lambda x, w: x.logcumsumexp(-1), "aten.logcumsumexp"),
    "norm": Hole(lambda x, w: x.norm(dim=-1), "aten.linalg_vector_norm"),
    "cosine_similarity": Hole(lambda x, w: F.cosine_similarity(x, w[:1]), "aten.linalg_vector_norm"),
    "product of features": Hole(lambda x, w: x.prod(-1), "aten.prod"),
    "adaptive_avg_pool": Hole(lambda x, w: F.adaptive_avg_pool2d(_three(x), (2, 2)), "aten._adaptive_avg_pool2d"),
    "avg_pool": Hole(lambda x, w: F.avg_pool2d(_three(x), 2, 1), "aten.avg_pool2d"),
    "embedding_bag": Hole(_bag, "aten._embedding_bag"),
    "attention with dropout": Hole(
        lambda x, w: F.scaled_dot_product_attention(_three(x), _three(x), _three(x), dropout_p=0.5), "aten."
    ),
    "renorm": Hole(lambda x, w: x.renorm(2, 0, 1.0), "aten."),
    # scatters
    "index_add": Hole(lambda x, w: torch.index_add(x, 0, _index(x) // 2, x), "aten.index_add"),
    "scatter_reduce": Hole(
        lambda x, w: x.scatter_reduce(1, (x > 0).long(), x, "sum"), "aten.scatter_reduce"
    ),
    "index_put that accumulates": Hole(
        lambda x, w: torch.index_put(x, (_index(x) // 2,), x, accumulate=True), "aten.index_put"
    ),
    "segment reduce": Hole(
        lambda x, w: torch.segment_reduce(x, "sum", lengths=torch.full((x.shape[0], 4), 3), axis=1), "aten.segment_reduce"
    ),
    # transforms
    "FFT": Hole(lambda x, w: torch.fft.rfft(x), "aten._fft_r2c"),
    "inverse": Hole(lambda x, w: torch.linalg.inv(x.view(-1, 3, 4)[:, :, :3] + 4 * torch.eye(3)), "aten.linalg_inv_ex"),
    "QR": Hole(lambda x, w: torch.linalg.qr(x.view(-1, 3, 4))[1], "aten.linalg_qr"),
    # what counts, or finds, among all rows
    "histogram": Hole(lambda x, w: x.round() + torch.histc(x, 4).amax(), "aten.histc"),
    "bincount": Hole(lambda x, w: x.round() + torch.bincount((x > 0).long().view(-1), minlength=2).amax(), "aten.bincount"),
    "unique": Hole(lambda x, w: torch._unique2(x.view(-1), return_inverse=True)[1].view(-1, 12), "aten._unique2"),
    "nonzero": Hole(lambda x, w: torch.nonzero_static(x > 0, size=6), "aten.nonzero_static", bits=False),
    "random numbers": Hole(lambda x, w: x + torch.rand_like(x), "aten.rand_like"),
    # rows that meet
    "mean over the batch": Hole(lambda x, w: x - x.mean(0), "aten.mean"),
    "softmax over the batch": Hole(lambda x, w: (x @ w).softmax(0), "aten._softmax"),
    "cumsum along the batch": Hole(lambda x, w: x.cumsum(0), "aten.cumsum"),
    "rows that attend to rows": Hole(
        lambda x, w: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0],
        "aten._scaled_dot_product_flash_attention_for_cpu",
    ),
    "batch behind a one": Hole(lambda x, w: x + x.view(1, -1, 12).logsumexp(1), "aten.logsumexp"),
    "contrast": Hole(lambda x, w: (x @ x.t()).softmax(-1) @ x, "aten._softmax"),
    "the largest of all": Hole(lambda x, w: x / x.abs().amax(), "aten.amax"),
    "three heaps of rows": Hole(lambda x, w: x + x.reshape(2, -1).sum(0).amax(), "aten.sum"),
    "a row's rank": Hole(lambda x, w: x * x[:, 0].argsort().argsort()[:, None], "aten.sort"),
    "the best two": Hole(lambda x, w: x + x[:, 0].topk(2)[0].sum(), "aten.topk"),
    # rows that meet behind something
    "mean over the batch, of a copy in columns": Hole(lambda x, w: x - x.t().contiguous().mean(1), "aten.mean"),
    "mean over batch and length": Hole(lambda x, w: x - x.view(-1, 3, 4).mean((0, 1)).repeat(3), "aten.mean"),
    "heads in front, then their rows": Hole(
        lambda x, w: x.view(-1, 3, 4).permute(1, 0, 2).softmax(1).permute(1, 0, 2).flatten(1), "aten._softmax"
    ),
    "neighbours in pairs": Hole(lambda x, w: (x.view(-1, 24).softmax(-1)).view(-1, 12), "aten._softmax"),
    "neighbours by a shift": Hole(lambda x, w: torch.stack([x, x.roll(1, 0)]).flatten(1).mean(1).sum() + x, "aten.mean"),
    "every second row, added up": Hole(lambda x, w: x + x[::2].sum(0), "aten.sum"),
    # make_fx would make a number of its symbolic size
    "padded, then merged": Hole(lambda x, w: x + F.pad(x, (0, 0, 1, 1)).amax(0), "aten.amax", how="compiled"),
    "rows against a queue of rows": Hole(lambda x, w: (x @ torch.cat([x, w]).t()).softmax(-1) @ torch.cat([x, w]), "aten._softmax"),
    "diagonal of rows by rows": Hole(lambda x, w: x * (x @ x.t()).diagonal().logsumexp(0), "aten.logsumexp"),
    "a norm of all": Hole(lambda x, w: x / x.norm(), "aten.linalg_vector_norm"),
    "einsum over the batch": Hole(lambda x, w: x @ torch.einsum("rk,rn->kn", x, x), "aten.bmm"),
    "average pool over rows": Hole(
        lambda x, w: F.avg_pool2d(x.view(1, 1, -1, 12), (2, 1), 1, (1, 0)).view(-1, 12)[: x.shape[0]], "aten.avg_pool2d"
    ),
    "maximum pool over rows": Hole(
        lambda x, w: F.max_pool2d(x.view(1, 1, -1, 12), (3, 1), 1, (1, 0)).view(-1, 12), "aten.max_pool2d_with_indices"
    ),
    "convolution along the rows": Hole(lambda x, w: F.conv1d(x.t()[None], w[:, :, None].expand(12, 12, 3), padding=1)[0].t(), "aten.convolution"),
}  # fmt: skip

CLEAN: dict[str, Function] = {
    "pointwise": lambda x, w: torch.relu(x) * 2 + x.abs(),
    "functions": lambda x, w: x.exp() + x.sin().tanh() + x.sigmoid(),
    "bias": lambda x, w: x + w[0],
    "where": lambda x, w: torch.where(x > 0, x, -x / 3),
    "clamp": lambda x, w: x.clamp(-1, 1).sqrt().nan_to_num(),
    "maximum over features": lambda x, w: x - x.amax(-1, keepdim=True),
    "argmax": lambda x, w: x.argmax(-1),
    "topk": lambda x, w: x.topk(3, -1)[0],
    "sort over features": lambda x, w: x.sort(-1)[0],
    "cummax": lambda x, w: x.cummax(1)[0],
    "linear": lambda x, w: F.linear(x, w, w[0]),
    "mm": lambda x, w: x @ w,
    "addmm": lambda x, w: torch.addmm(w[0], x, w, alpha=0.5),
    "product of a transpose": lambda x, w: (w.t() @ x.t()).t(),
    "einsum": lambda x, w: torch.einsum("rk,nk->rn", x, w),
    "bmm": lambda x, w: torch.bmm(x.view(-1, 3, 4), w.view(3, 4, 12)[0].expand(x.shape[0], 4, 12)),
    "two layers": lambda x, w: F.gelu(x @ w) @ w.t() + x,
    "gated": lambda x, w: F.silu(x @ w) * (x @ w.t()),
    "softmax": lambda x, w: x.softmax(-1),
    "log_softmax": lambda x, w: x.log_softmax(-1),
    "softmax of a transpose": lambda x, w: x.t().softmax(0).t(),
    "sum": lambda x, w: x.sum(-1),
    "sum of a transpose": lambda x, w: x.t().sum(0),
    "mean over heads": lambda x, w: x.view(-1, 3, 4).mean(1),
    "batch and heads merged": lambda x, w: x.view(-1, 4).softmax(-1).view(-1, 12),
    "heads apart and together": lambda x, w: x.view(-1, 3, 4).transpose(1, 2).reshape(-1, 12),
    "heads in front": lambda x, w: x.view(-1, 3, 4).permute(1, 0, 2).sum(-1).t(),
    "merged behind a transpose": lambda x, w: x.t().reshape(-1).view(12, -1).sum(0),
    "norm": lambda x, w: x / x.norm(dim=-1, keepdim=True),
    "variance": lambda x, w: x.var(-1),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "cumsum": lambda x, w: x.cumsum(1),
    "layer_norm": lambda x, w: F.layer_norm(x, [12], w[0], w[1]),
    "rms_norm by hand": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[0],
    "group_norm": lambda x, w: F.group_norm(x, 3, w[0], w[1]),
    "attention": lambda x, w: F.scaled_dot_product_attention(_three(x), _three(x), _three(x)).flatten(1),
    "causal attention": lambda x, w: F.scaled_dot_product_attention(_three(x), _three(x), _three(x), is_causal=True),
    "attention by hand": lambda x, w: (x.view(-1, 3, 4) @ x.view(-1, 3, 4).transpose(1, 2)).softmax(-1) @ x.view(-1, 3, 4),
    "rotary": lambda x, w: torch.cat([x[:, :6] * w[0, :6] - x[:, 6:] * w[1, :6], x[:, 6:] + x[:, :6]], -1),
    "embedding": lambda x, w: F.embedding((x[:, 0].abs() * 3).long().clamp(0, 11), w),
    "rows gathered": lambda x, w: torch.cat([x, x.flip(0)])[: x.shape[0]].relu(),
    "batches one behind the other": lambda x, w: torch.cat([x, x * 2], 0).softmax(-1)[: x.shape[0]],
    "features gathered": lambda x, w: x.gather(1, x.abs().argmax(1, keepdim=True)),
    "one hot": lambda x, w: (x.abs().long()[..., None] == torch.arange(4)).long(),
    "integers added up": lambda x, w: (x > 0).long().sum(-1),
    "integers multiplied": lambda x, w: (x * 3).long() @ (w * 3).long(),
    "in place": lambda x, w: x.clone().mul_(2).add_(w[0]),
    "out= of a product": _product_out,
    "scatter": lambda x, w: torch.zeros_like(x).scatter(1, (x > 0).long(), 1.0),
    "split": lambda x, w: torch.stack([part.sum(-1) for part in x.split(4, 1)], 1),
    "experts": lambda x, w: _experts(x, w),
    "padded": lambda x, w: F.pad(x, (1, 3)).sum(-1),
    # sequences [ROWS, 3, 4]: a length is no batch
    "a cache that grows": lambda x, w: _attends(x, torch.cat([x, x * 2], 1).view(-1, 1, 6, 4)),
    "left padding": lambda x, w: F.scaled_dot_product_attention(
        _three(x), _three(x), _three(x), attn_mask=(torch.arange(3) >= (x[:, :1] > 0).long())[:, None, None]
    ),
    "a window": lambda x, w: F.scaled_dot_product_attention(
        _three(x), _three(x), _three(x), attn_mask=(torch.arange(3)[:, None] - torch.arange(3)).abs() < 2
    ),
    "a cache that is written": lambda x, w: _attends(
        x, x.new_zeros(x.shape[0], 1, 5, 4).index_copy(2, torch.tensor([0, 2, 4]), _three(x))
    ),
    "positions": lambda x, w: x.view(-1, 3, 4) + w[torch.arange(3), :4],
    "pooled": lambda x, w: (x.view(-1, 3, 4) * w[:3, :1]).sum(1) / w[:3, :1].sum(),
    "last token": lambda x, w: x.view(-1, 3, 4)[torch.arange(x.shape[0]), (x[:, 0] > 0).long()] @ w[:4],
    "shared heads": lambda x, w: (
        x.view(-1, 3, 4) @ x.view(-1, 3, 4)[:, :1].repeat_interleave(3, 1).transpose(1, 2)
    ).softmax(-1),
    "modulated": lambda x, w: F.layer_norm(x, [12]) * (1 + F.silu(x[:, :1] * w[0]) @ w) + x,
    "a matrix for each row": lambda x, w: torch.bmm(x[:, None], (w * x[:, None, :1]).transpose(1, 2))[:, 0],
    "convolution of a row": lambda x, w: F.conv2d(_three(x), w[:2, :4].reshape(2, 1, 2, 2), w[0, :2]).flatten(1),
    "convolution of each channel": lambda x, w: F.conv1d(x.view(-1, 3, 4), w[:3, None, :2], groups=3).flatten(1),
    "convolution of the patches that are rows": lambda x, w: F.conv1d(x.view(-1, 1, 4), w[:2, None, :3]).view(x.shape[0], -1),
    "transposed convolution": lambda x, w: F.conv_transpose1d(x.view(-1, 3, 4), w[:3, :6].view(3, 2, 3), stride=2).flatten(1),
    "pools": lambda x, w: F.max_pool2d(_three(x), 2, 1).flatten(1) + F.avg_pool2d(_three(x), 2, 1).flatten(1),
    "mean over a window of time": lambda x, w: F.adaptive_avg_pool2d(_three(x), (2, 3)).flatten(1),
}  # fmt: skip
