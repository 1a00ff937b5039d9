"""Scaled dot product attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Attention, BySize, PagedAttention
from .declare import check, composite, operator
from .reduce import _float


@operator(
    "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, "
    "*, float? scale=None) -> (Tensor, Tensor)",
    batch=Attention("query", "key", "value"),
)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(query @ key^T * scale + mask) @ value for each batch and head.

    query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], Hq a multiple of Hkv (grouped heads). attn_mask: bool
    (True takes part) or float (added), broadcastable to [B, Hq, L, S]. is_causal: position i of L sees the keys 0..i, as
    in `torch.nn.functional.scaled_dot_product_attention`. scale: 1/sqrt(D) unless given. No dropout.

    Returns the output [B, Hq, L, Dv], contiguous, in query's dtype, and the logsumexp of the scaled, masked scores
    [B, Hq, L] in float32 (float64 for float64). A row without any key gives 0 (and a logsumexp of -inf).

    A query row's result depends on that row, its keys, values and mask alone: scores as in `mm` (sum over D), softmax's
    sum and the sum over S ascending in S, so that masked keys behind the last seen one do not change the bits.
    In 16 bits on CUDA the keys are in segments, of 256 up to key 2,048, of 512 up to key 8,192, of 1,024 behind it: each has a
    maximum and sums of its own, ascending, and the segments are joined, ascending. Who takes a segment changes no bits, and a bool mask
    has those of the same mask in floats.
    """
    _float("scaled_dot_product_attention", query)
    check(
        query.dim() == key.dim() == value.dim() == 4 and query.dtype == key.dtype == value.dtype,
        lambda: (
            "bi_compile::scaled_dot_product_attention takes 4-D query, key and value of one dtype, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (query, key, value))
        ),
    )
    check(
        query.shape[1] % key.shape[1] == 0,
        lambda: (
            f"bi_compile::scaled_dot_product_attention: {query.shape[1]} query heads are no multiple of {key.shape[1]} key heads"
        ),
    )
    stat = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty([*query.shape[:-1], value.shape[-1]]), query.new_empty(query.shape[:-1], dtype=stat)


@operator(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor lengths, Tensor? block_table=None, *, Tensor? query_rope=None, "
    "Tensor? key_rope=None, float? scale=None, int? left=None, int? right=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None) -> (Tensor, Tensor)",
    batch=PagedAttention("query"),
)
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of R requests whose tokens lie one behind the other (the layout TND), prefill and decode alike, in one launch.

    query [T, Hq, D], Hq a multiple of Hkv. lengths [2, R], int32, contiguous, on query's device: the ends of the requests'
    tokens in T, ascending, and how many keys each has. With a block_table [R, P], int32: key [pages, page_size, Hkv, D],
    value [pages, page_size, Hkv, Dv]; key n of request r is number n % page_size of the page block_table[r, n // page_size].
    Without one: key [S, Hkv, D], value [S, Hkv, Dv], the requests' keys one behind the other, and lengths[1] their ends.

    query_rope [T, Hq, Dr] and key_rope, key's shape with Dr in place of D, are given together: a head's rotated part where it
    is kept apart, as latent attention (MLA) does. A score is then the sum over D and after it, in the same accumulator, over Dr.

    The last query of a request stands at its last key: query i of L is at position p = keys - L + i, and sees the keys
    from p - left to p + right (both in it; None: no limit). right=0 is causal. scale: 1/sqrt(D + Dr) unless given.

    softcap: softcap * tanh(score / softcap) in place of each scaled score. alibi_slopes [Hq]: slope * (the key's position - p) is
    added to it. sinks [Hq]: one more score for each query, of a key without a value; its exp is added last. These three are
    computed on a CPU alone so far; elsewhere they are a NotImplementedError.

    Returns the output [T, Hq, Dv], contiguous, in query's dtype, and the logsumexp of the scores [T, Hq] in float32
    (float64 for float64). A token that sees no key, or lies behind the last request's end, gives 0 (and -inf).

    The sums are those of `scaled_dot_product_attention` for the request alone with its keys in one piece: ascending over the
    request's keys from its key 0, in blocks (and segments) that depend on dtype and device alone. Where the pages lie, how long they are
    and which other requests there are does not change the bits. Numbers in lengths and block_table are read on the device
    and are not checked there: a page beyond the cache is read as whatever lies in memory (on a CPU: an IndexError).
    """
    name = "bi_compile::paged_attention"
    _float("paged_attention", query)
    rank = 3 if block_table is None else 4
    check(
        query.dim() == 3 and key.dim() == value.dim() == rank and query.dtype == key.dtype == value.dtype,
        lambda: (
            f"{name} takes a 3-D query and {rank}-D key and value {'without' if rank == 3 else 'with'} a block_table, of one "
            f"dtype, got {', '.join(f'{tuple(t.shape)} {t.dtype}' for t in (query, key, value))}"
        ),
    )
    check(
        key.shape[:-1] == value.shape[:-1] and query.shape[2] == key.shape[-1] and query.shape[1] % key.shape[-2] == 0,
        lambda: (
            f"{name}: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: heads of one "
            "length in query and key, query heads a multiple of key heads, as many keys as values"
        ),
    )
    check(
        (query_rope is None) == (key_rope is None)
        and (
            query_rope is None
            or key_rope is None
            or (
                query_rope.shape == (*query.shape[:2], query_rope.shape[-1])
                and key_rope.shape == (*key.shape[:-1], query_rope.shape[-1])
                and query_rope.dtype == key_rope.dtype == query.dtype
            )
        ),
        lambda: (
            f"{name}: query_rope and key_rope are given together, in the dtype {query.dtype} and the shapes of query and key but for the last "
            "dimension, got "
            + ", ".join("None" if t is None else f"{tuple(t.shape)} {t.dtype}" for t in (query_rope, key_rope))
        ),
    )
    tables = [lengths] if block_table is None else [lengths, block_table]
    check(
        all(t.dim() == 2 and t.dtype == torch.int32 and t.device == query.device for t in tables)
        and lengths.shape[0] == 2
        and all(t.shape[1] <= 1 or t.stride(1) == 1 for t in tables)
        and (lengths.shape[1] == tables[-1].shape[0] or block_table is None)
        and lengths.is_contiguous(),
        lambda: (
            f"{name} takes lengths [2, requests] and block_table [requests, pages], int32, rows contiguous, on {query.device}, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype} {t.stride()} on {t.device}" for t in tables)
        ),
    )
    check(
        (left is None or left >= 0) and (right is None or right >= 0),
        lambda: f"{name}: left={left} and right={right} count keys beside a query's own position and are not negative",
    )
    stat = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty([*query.shape[:-1], value.shape[-1]]), query.new_empty(query.shape[:-1], dtype=stat)


@operator(
    "sequence_attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? position_ids=None, *, float? scale=None, "
    "int? left=None, float? softcap=None, Tensor? sinks=None) -> (Tensor, Tensor)",
    batch=Attention("query", "key", "value"),
)
def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    scale: float | None = None,
    left: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of sequences in padded or packed rows, each with the bits that it has alone, in `paged_attention`'s order.

    query [B, Hq, L, D], key and value [B, Hkv, L, D]; mask and position_ids [B or 1, 1, 1, L], as attention's masks are broadcast.
    A sequence begins with a row, where mask goes from zero to not zero, and where position_ids is zero. What is padding gets some
    result. left, softcap, sinks and scale as in `paged_attention`. Returns the output [B, Hq, L, D], contiguous, and the logsumexp
    [B, Hq, L] in float32 (float64 for float64).

    Raises:
        ValueError: a row of mask has padding between tokens.
    """
    name = "bi_compile::sequence_attention"
    _float("sequence_attention", query)
    check(
        query.dim() == 4 and key.shape == value.shape == (query.shape[0], key.shape[1], *query.shape[2:]),
        lambda: (
            f"{name} takes query [B, Hq, L, D], key and value [B, Hkv, L, D], got "
            + ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        ),
    )
    given = [x for x in (mask, position_ids) if x is not None]
    check(
        all(
            x.dim() == 4 and x.shape[0] in (1, query.shape[0]) and x.shape[1:] == (1, 1, query.shape[2]) for x in given
        ),
        lambda: (
            f"{name} takes mask and position_ids [B or 1, 1, 1, L], got {', '.join(str(tuple(x.shape)) for x in given)} for query "
            f"{tuple(query.shape)}"
        ),
    )
    stat = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=stat)


def _ends(rows: int, length: int, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The ends of the sequences in rows that are laid one behind the other, int32."""
    begins = torch.zeros(rows, length, dtype=torch.bool)
    begins[:, :1] = True
    if position_ids is not None:
        begins |= position_ids[:, 0, 0].cpu() == 0
    if mask is not None:
        seen = mask[:, 0, 0].cpu() != 0
        after = seen[:, 1:] & ~seen[:, :-1]
        if bool((after.sum(1) + seen[:, 0] > 1).any()):
            raise ValueError(
                "bi_compile::sequence_attention: a row of the mask has padding between tokens: put a sequence's tokens side by side"
            )
        begins[:, 1:] |= after
    at = begins.flatten().nonzero().flatten()
    return torch.cat([at[1:], at.new_tensor([rows * length])]).int()


def _side_by_side(x: Tensor) -> Tensor:
    """[B, H, L, ...] as [B * L, H, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


@composite("sequence_attention")
def _sequence_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None, *, scale: float | None = None,
    left: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequence_attention.meta(query, key, value, mask, position_ids)
    rows, _, length, _ = query.shape
    lengths = _ends(rows, length, mask, position_ids).to(query.device).expand(2, -1).contiguous()
    flat = [_side_by_side(x) for x in (query, key, value)]
    out, lse = paged_attention(*flat, lengths, scale=scale, left=left, right=0, softcap=softcap, sinks=sinks)
    back = [x.unflatten(0, (rows, length)).transpose(1, 2).contiguous() for x in (out, lse)]
    return back[0], back[1]


@operator(
    "sequence_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, Tensor? mask=None, "
    "Tensor? position_ids=None, *, float? scale=None, int? left=None, float? softcap=None) -> (Tensor, Tensor, Tensor)",
    batch=BySize(),
)
def sequence_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    scale: float | None = None,
    left: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `sequence_attention`'s query, key and value, without sinks, for `grad` of its output; all contiguous.

    In float32 (float64 for float64), rounded once, by PyTorch's own products: as any backward pass it may vary with the batch.
    """
    _float("sequence_attention_backward", query)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@composite("sequence_attention_backward")
def _sequence_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, mask: Tensor | None = None,
    position_ids: Tensor | None = None, *, scale: float | None = None, left: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sequence_attention_backward.meta(grad, query, key, value, output, logsumexp)
    wide, rows, length = logsumexp.dtype, query.shape[0], query.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, y, dy, lse = (
        _side_by_side(x).transpose(0, 1).to(wide) for x in (query, key, value, output, grad, logsumexp)
    )
    found = [torch.zeros_like(x) for x in (q, k, v)]
    group, start = len(q) // max(len(k), 1), 0
    for end in _ends(rows, length, mask, position_ids).tolist():
        at, start = slice(start, end), end
        keys, values = (x[:, at].repeat_interleave(group, 0) for x in (k, v))
        score = q[:, at] @ keys.mT * scale
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        place = torch.arange(score.shape[-1], device=score.device)
        before = place.unsqueeze(1) - place
        unseen = (before < 0) | (before > (length if left is None else left))
        p = torch.exp(score - lse[:, at].unsqueeze(-1)).masked_fill(unseen, 0)
        ds = p * (dy[:, at] @ values.mT - (dy[:, at] * y[:, at]).sum(-1, keepdim=True)) * scale
        ds = ds if softcap is None else ds * (1 - (score / softcap) ** 2)
        for total, part in zip(found, (ds @ keys, ds.mT @ q[:, at], p.mT @ dy[:, at]), strict=True):
            total[:, at] = part.unflatten(0, (len(total), -1)).sum(1)
    back = [x.unflatten(1, (rows, length)).transpose(0, 1).to(query.dtype).contiguous() for x in found]
    return back[0], back[1], back[2]
