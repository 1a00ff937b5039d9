"""Scaled dot product attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Attention, PagedAttention
from .declare import check, operator
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
    request's keys from its key 0, in blocks that depend on dtype and device alone. Where the pages lie, how long they are
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
