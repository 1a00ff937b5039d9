"""What each operator does with the rows: where they are in its result, and which dimensions it combines.

`RULES` is the table for other people's operators; ours say it where they are declared (`DECLARED` gives that its meaning).
`batch_dims` follows a graph with them. Where the rows are is a `layout`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._ops import OpOverload

from ..ops import BATCH, NAMESPACE, batch
from ..rewrite.fx_utils import as_list
from .layout import Dim, Factor, Layout, as_one, carries, size_of, split, union
from .node import Node, Result, Rule
from .pointwise import is_pointwise


def _aligned(n: Node, tensors: Sequence[fx.Node], shape: Sequence[int]) -> Layout:
    """Broadcast together, aligned at the right."""
    out: list[Dim] = [(Factor(size, False),) for size in shape]
    for x in tensors:
        layout = n.layout(x)
        for i in range(1, min(len(layout), len(out)) + 1):
            if carries(layout[-i]):
                out[-i] = union(out[-i], layout[-i])
    return tuple(out)


def _elementwise(n: Node) -> Result:
    return _aligned(n, n.tensors, n.shape), ()


def _by_size(n: Node) -> Result:
    """An operator of which nothing more is known: a dimension stays where its size does."""
    out: list[Dim] = [(Factor(size, False),) for size in n.shape]
    for x in n.tensors:
        for i, dim in enumerate(n.layout(x)[: len(out)]):
            if carries(dim) and n.shape[i] == size_of(x.meta["val"].shape[i]):
                out[i] = union(out[i], dim)
    return tuple(out), ()


def _reshaped(n: Node) -> Result:
    return split(n.layout(n.first), n.shape), ()


def _permuted(n: Node) -> Result:
    layout = n.layout(n.first)
    order = list(range(len(layout)))
    if n.packet in ("permute", "permute_copy"):
        order = [d % len(order) for d in n.arg("dims")]
    elif n.packet == "t":
        order.reverse()
    elif order:
        a, b = n.arg("dim0") % len(order), n.arg("dim1") % len(order)
        order[a], order[b] = order[b], order[a]
    return tuple(layout[i] for i in order), ()


def _dims(n: Node, rank: int, name: str = "dim") -> list[int]:
    """The dimensions that an argument names; all if it names none."""
    dim = n.arg(name, n.arg("dims"))
    if dim is None or dim == [] or not rank:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _kept(layout: Layout, gone: Sequence[int], rank: int) -> Layout:
    """Without the dimensions `gone`, or with them at size 1 where the rank stays."""
    if len(layout) == rank:
        return tuple((Factor(1, False),) if i in gone else dim for i, dim in enumerate(layout))
    return tuple(dim for i, dim in enumerate(layout) if i not in gone)


def _reduced(n: Node, name: str = "dim") -> Result:
    if n.packet in ("max", "min") and len(n.tensors) > 1:
        return _elementwise(n)
    layout = n.layout(n.first)
    dims = _dims(n, len(layout), name)
    return _kept(layout, dims, len(n.shape)), [(n.first, d) for d in dims]


def _along(n: Node, name: str = "dim") -> Result:
    """Combines a dimension and keeps it: softmax, cumsum, sort."""
    layout = n.layout(n.first)
    dims = [n.arg(name, -1) % len(layout)] if layout else []
    out = tuple(
        as_one(dim, size) if i in dims else dim for i, (dim, size) in enumerate(zip(layout, n.shape, strict=True))
    )
    return out, [(n.first, d) for d in dims]


def _selected(n: Node) -> Result:
    layout = n.layout(n.first)
    return _kept(layout, [n.arg("dim", 0) % len(layout)], len(layout) - 1), ()


def _squeezed(n: Node) -> Result:
    layout, shape = n.layout(n.first), n.first.meta["val"].shape
    gone = [d for d in _dims(n, len(layout)) if size_of(shape[d]) == 1]
    return _kept(layout, gone, len(layout) - len(gone) or -1), ()


def _unsqueezed(n: Node) -> Result:
    layout = n.layout(n.first)
    at = n.arg("dim") % (len(layout) + 1)
    return (*layout[:at], (Factor(1, False),), *layout[at:]), ()


def _resized(n: Node) -> Result:
    """Slices, paddings, rolls: the same dimensions, some of another size."""
    layout = n.layout(n.first)
    return tuple(dim if _length(dim) == m else as_one(dim, m) for dim, m in zip(layout, n.shape, strict=True)), ()


def _length(dim: Dim) -> int:
    return math.prod(f.size for f in dim)


def _parts(n: Node) -> Result:
    """split, chunk, unbind: each part has the dimensions of the whole, unbind's without the one it takes apart."""
    layout = n.layout(n.first)
    outs = []
    for value in n.value:
        shape = [size_of(m) for m in value.shape]
        if len(shape) < len(layout):
            outs.append(_kept(layout, [n.arg("dim", 0) % len(layout)], len(shape)))
        else:
            outs.append(tuple(d if _length(d) == m else as_one(d, m) for d, m in zip(layout, shape, strict=True)))
    return tuple(outs), ()


def _joined(n: Node) -> Result:
    """cat: rows of several tensors one behind the other; and stack."""
    # an empty tensor of one dimension is passed over, as cat does
    layouts = [n.layout(x) for x in n.arg("tensors")]
    rank = max(map(len, layouts))
    merged = [
        (Factor(0, any(carries(x[i]) for x in layouts if len(x) == rank)),)
        if len({x[i] for x in layouts if len(x) == rank}) > 1
        else next(x for x in layouts if len(x) == rank)[i]
        for i in range(rank)
    ]
    if n.packet == "stack":
        merged.insert(n.arg("dim") % (rank + 1), (Factor(0, False),))
    return tuple(dim if _length(dim) == m else as_one(dim, m) for dim, m in zip(merged, n.shape, strict=True)), ()


def _embedded(n: Node) -> Result:
    indices = n.layout(n.arg("indices"))
    return (*indices, (Factor(n.shape[-1], False),)), ()


def _index_selected(n: Node) -> Result:
    layout, index = n.layout(n.arg("self")), n.layout(n.arg("index"))
    if not layout:
        return _by_size(n)
    at = n.arg("dim") % len(layout)
    rows = carries(layout[at]) or any(map(carries, index))
    return tuple((Factor(m, rows),) if i == at else d for i, (d, m) in enumerate(zip(layout, n.shape, strict=True))), ()


def _gathered(n: Node) -> Result:
    layout, index = n.layout(n.arg("self")), n.layout(n.arg("index"))
    at = n.arg("dim", 0) % max(len(index), 1)
    if len(layout) != len(index):
        return _by_size(n)
    return tuple(
        i if carries(i) or not carries(d) else as_one(d, m) if d_ == at or _length(d) != m else d
        for d_, (d, i, m) in enumerate(zip(layout, index, n.shape, strict=True))
    ), ()


def _indexed(n: Node) -> Result:
    """x[i, j, :]: the indices are broadcast together and stand where the first of them stood, in front if they are apart."""
    layout, indices = n.layout(n.arg("self")), list(n.arg("indices"))
    at = [i for i, x in enumerate(indices) if x is not None]
    given = [indices[i] for i in at]
    if any(x.meta["val"].dtype in (torch.bool, torch.uint8) for x in given):
        return _by_size(n)
    width = max((len(n.layout(x)) for x in given), default=0)
    start = at[0] if at and at == list(range(at[0], at[-1] + 1)) else 0
    index = list(_aligned(n, given, n.shape[start : start + width]))
    if any(carries(layout[i]) for i in at) and not any(map(carries, index)) and index:
        index[0] = (Factor(n.shape[start], True),)  # rows that are picked by fixed numbers are rows
    rest = [dim for i, dim in enumerate(layout) if i not in at]
    return (*rest[:start], *index, *rest[start:]), ()


def _repeated(n: Node) -> Result:
    layout = n.layout(n.first)
    padded = ((Factor(1, False),),) * (len(n.shape) - len(layout)) + layout
    return tuple(
        dim if _length(dim) == m else (Factor(m // (_length(dim) or 1), False), *dim)
        for dim, m in zip(padded, n.shape, strict=True)
    ), ()


def _strided(n: Node) -> Result:
    """as_strided: a dimension carries rows if a step along it may reach another row."""
    value, layout = n.first.meta["val"], n.layout(n.first)
    steps = [size_of(value.stride(i)) for i, dim in enumerate(layout) if carries(dim)]
    same = [size_of(s) for s in value.stride()] == [size_of(s) for s in n.value.stride()]
    if same and [size_of(m) for m in value.shape] == n.shape:
        return layout, ()
    reach = [size_of(s) * (m - 1) for s, m in zip(n.value.stride(), n.shape, strict=True)]
    return tuple((Factor(m, any(r >= s for s in steps)),) for r, m in zip(reach, n.shape, strict=True)), ()


def _unfolded(n: Node) -> Result:
    layout = n.layout(n.first)
    at = n.arg("dimension") % len(layout)
    window: Dim = (Factor(n.shape[-1], carries(layout[at])),)
    return (*(as_one(d, n.shape[i]) if i == at else d for i, d in enumerate(layout)), window), ()


def _diagonal(n: Node) -> Result:
    layout = n.layout(n.first)
    two = [n.arg("dim1", 0) % len(layout), n.arg("dim2", 1) % len(layout)]
    return (*_kept(layout, two, -1), (Factor(n.shape[-1], any(carries(layout[i]) for i in two)),)), ()


def _product(a: str, b: str) -> Rule:
    """[..., M, K] by [..., K, N]; either may have one dimension, which is K."""

    def rule(n: Node) -> Result:
        x, y = n.arg(a), n.arg(b)
        left, right = n.layout(x), n.layout(y)
        combined = [(x, len(left) - 1), (y, max(len(right) - 2, 0))]
        ends = (*left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
        lead = n.shape[: len(n.shape) - len(ends)]
        outer: list[Dim] = [(Factor(m, False),) for m in lead]
        for layout in (left, right):
            for i in range(1, min(len(layout) - 2, len(outer)) + 1):
                if carries(layout[-2 - i]):
                    outer[-i] = union(outer[-i], layout[-2 - i])
        out = [*outer, *ends]
        for t in n.tensors:
            if t not in (x, y):  # the bias
                out = [union(o, p) for o, p in zip(out, _aligned(n, [t], n.shape), strict=True)]
        return tuple(out), combined

    return rule


def _transposed_product(n: Node, a: str, b: str) -> Result:
    """[B, M, K] by [B, K, N]: the rows come first in the result [M, B, N]."""
    x, y = n.arg(a), n.arg(b)
    left, right = n.layout(x), n.layout(y)
    batches = union(left[0], right[0]) if carries(right[0]) else left[0]
    return (left[1], batches, right[2]), [(x, 2), (y, 1)]


def _summed_product(n: Node) -> Result:
    """addbmm: the products of all batches are added up."""
    out, combined = _product("batch1", "batch2")(n)
    return out, [*combined, (n.arg("batch1"), 0), (n.arg("batch2"), 0)]


def _grouped(n: Node, a: str, b: str) -> Result:
    """[M, K] by [G, K, N]: each row meets its group's matrix."""
    x, w = n.arg(a), n.arg(b)
    return (*n.layout(x)[:1], *n.layout(w)[2:]), [(x, 1), (w, 1)]


def _combined_experts(n: Node, x: str, weights: str) -> Result:
    """[M, H] by [N, k]: each token adds up k of the rows, which it names."""
    rows, w = n.arg(x), n.arg(weights)
    return (*n.layout(w)[:1], *n.layout(rows)[1:]), [(w, 1)]


def _tokens(n: Node, names: Sequence[str]) -> Dim:
    """The first dimension of the arguments `names`, where there is one: the same tokens."""
    first, *others = (n.layout(n.arg(name))[0] for name in names if n.arg(name) is not None)
    return functools.reduce(union, filter(carries, others), first)


def _experts(n: Node, x: str, per_token: Sequence[str]) -> Result:
    """[N, H]: each token by itself, with whole matrices, which it names."""
    combined = [(t, d) for t in n.tensors for d in range(1, len(n.layout(t)))]
    return (_tokens(n, (x, *per_token)), (Factor(n.shape[-1], False),)), combined


def _linear(n: Node) -> Result:
    x, w = n.arg("input"), n.arg("weight")
    layout, weight = n.layout(x), n.layout(w)
    return (*layout[:-1], *weight[:-1]), [(x, len(layout) - 1), (w, len(weight) - 1)]


def _attention(n: Node, query: str = "query", key: str = "key", value: str = "value") -> Result:
    """Every query meets every key of its batch: the keys, and the features of the queries, are combined."""
    q, k, v = n.arg(query), n.arg(key), n.arg(value)
    layout = n.layout(q)
    rank = len(layout)
    combined = [(q, rank - 1), (k, rank - 1), (k, rank - 2), (v, rank - 2)]
    out = [*layout[:-1], (Factor(n.shape[-1], False),)]
    for x in (k, v):
        for i, dim in enumerate(n.layout(x)[:-2]):
            out[i] = union(out[i], dim) if carries(dim) else out[i]
    for mask in (t for t in n.tensors if t not in (q, k, v) and n.layout(t)):  # broadcast to [..., L, S]
        combined.append((mask, len(n.layout(mask)) - 1))
        for i in range(2, len(n.layout(mask)) + 1):
            out[-i] = union(out[-i], n.layout(mask)[-i])
    if isinstance(n.value, Tensor):
        return tuple(out), combined
    return tuple(tuple(out[: v.dim()]) if isinstance(v, Tensor) else () for v in n.value), combined


def _paged_attention(n: Node, query: str) -> Result:
    """[T, H, D]: each token by itself; what else there is, belongs to requests, whose tokens are told from it."""
    q = n.arg(query)
    others = [(x, i) for x in n.tensors if x is not q for i in range(len(n.layout(x)))]
    rows = n.layout(q)[:2]
    return ((*rows, (Factor(n.shape[-1], False),)), rows), [(q, 2), *others]


def _per_token(n: Node, own: Sequence[str]) -> Result:
    """Each token by itself; what else there is, belongs to all."""
    mine = [n.arg(name) for name in own]
    combined = [(x, i) for x in n.tensors for i in range(1 if x in mine else 0, len(n.layout(x)))]
    tokens = _tokens(n, own)
    return tuple((tokens, *((Factor(size_of(m), False),) for m in v.shape[1:])) for v in n.value), combined


def _normalised(start: Callable[[Node, int], int]) -> Rule:
    """Statistics over the dimensions from `start` on: the result, then the statistics."""

    def rule(n: Node) -> Result:
        # compared as expressions: symbolic sizes that are compared become a guard
        exact = {
            x: [m.node.expr if isinstance(m, SymInt) else m for m in x.meta["val"].shape] for x in (n.first, *n.tensors)
        }
        added = [x for x in n.tensors if exact[x] == exact[n.first]]  # x, and its residual
        layout = _aligned(n, added, [size_of(m) for m in n.first.meta["val"].shape])
        at = start(n, len(layout)) % max(len(layout), 1)
        outs = []
        for value in n.value if isinstance(n.value, (tuple, list)) else [n.value]:
            shape = [size_of(m) for m in value.shape]
            outs.append(
                tuple(
                    d if i < at or shape == n.shape else (Factor(m, False),)
                    for i, (d, m) in enumerate(zip(layout, shape, strict=False))
                )
            )
        out = tuple(outs) if isinstance(n.value, (tuple, list)) else outs[0]
        return out, [(x, d) for x in added for d in range(at, len(layout))]

    return rule


def _batch_norm(n: Node) -> Result:
    """Statistics over all but the channels where it trains; fixed ones otherwise."""
    layout = n.layout(n.first)
    trains = n.arg("training", n.arg("train", "no_training" not in n.packet))
    out = tuple(layout if isinstance(v, Tensor) and v.dim() == len(layout) else () for v in n.value)
    return out, [(n.first, d) for d in range(len(layout)) if d != 1] if trains else ()


def _convolved(n: Node) -> Result:
    layout = n.layout(n.first)
    return (layout[0], *((Factor(m, False),) for m in n.shape[1:])), [(n.first, d) for d in range(1, len(layout))]


def _pooled(n: Node) -> Result:
    """Windows over the last dimensions."""
    layout = n.layout(n.first)
    k = 3 if "3d" in n.packet else len(n.arg("kernel_size")) if n.packet.startswith("_low_memory") else 2
    found = [
        (*layout[:-k], *((Factor(size_of(m), False),) for m in value.shape[-k:])) if isinstance(value, Tensor) else ()
        for value in as_list(n.value)
    ]
    out = found[0] if isinstance(n.value, Tensor) else tuple(found)
    return out, [(n.first, d) for d in range(len(layout) - k, len(layout))]


def _fresh(n: Node) -> Result:
    return tuple((Factor(m, False),) for m in n.shape), ()


def _bag(n: Node) -> Result:
    """embedding_bag: the bags are cut out of one list of indices."""
    return _by_size(n)[0], [(n.arg("indices"), 0)] if len(n.layout(n.arg("indices"))) == 1 else ()


def _table(*rows: tuple[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in names.split()}


#: operators by name, without namespace and overload; an operator in place follows the rule of the functional one
RULES: dict[str, Rule] = _table(
    ("view reshape _unsafe_view _reshape_copy view_copy flatten collapse", _reshaped),
    ("permute permute_copy t transpose", _permuted),
    ("select select_copy", _selected),
    ("squeeze squeeze_copy", _squeezed),
    ("unsqueeze unsqueeze_copy", _unsqueezed),
    ("slice slice_copy narrow narrow_copy constant_pad_nd flip roll rev index_fill", _resized),
    ("split split_with_sizes chunk unbind unsafe_split split_copy split_with_sizes_copy unbind_copy", _parts),
    ("cat stack", _joined),
    ("expand copy _to_copy contiguous expand_copy broadcast_in_dim slice_scatter", _elementwise),
    ("embedding", _embedded),
    ("index_select", _index_selected),
    ("gather", _gathered),
    ("index _unsafe_index", _indexed),
    ("repeat", _repeated),
    ("as_strided as_strided_copy", _strided),
    ("unfold unfold_copy", _unfolded),
    ("diagonal diagonal_copy", _diagonal),
    ("full full_like new_full zeros zeros_like new_zeros ones ones_like new_ones empty empty_like new_empty arange iota", _fresh),
    ("sum nansum mean prod amax amin aminmax max min argmax argmin any all var std var_mean std_mean norm nanmedian", _reduced),
    ("linalg_vector_norm logsumexp median mode kthvalue count_nonzero xor_sum", _reduced),
    ("softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp", _along),
    ("sort topk argsort unique_dim unique_consecutive", _along),
    ("mm bmm matmul dot", lambda n: _product("self", _second(n))(n)),
    ("mv", _product("self", "vec")),
    ("addmv", _product("mat", "vec")),
    ("addmm", _product("mat1", "mat2")),
    ("addbmm", _summed_product),
    ("baddbmm", _product("batch1", "batch2")),
    ("linear", _linear),
    ("scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu", _attention),
    ("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention", _attention),
    ("_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math", _attention),
    ("rms_norm layer_norm npu_rms_norm npu_add_rms_norm", _normalised(lambda n, rank: -1)),
    ("native_layer_norm _fused_rms_norm", _normalised(lambda n, rank: rank - len(n.arg("normalized_shape")))),
    ("group_norm native_group_norm", _normalised(lambda n, rank: 1)),
    ("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training", _batch_norm),
    ("_native_batch_norm_legit_functional cudnn_batch_norm _batch_norm_with_update", _batch_norm),
    ("convolution _convolution", _convolved),
    ("max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d", _pooled),
    ("avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d _low_memory_max_pool_with_offsets", _pooled),
    ("_embedding_bag _embedding_bag_forward_only", _bag),
)  # fmt: skip


def _second(n: Node) -> str:
    return next(name for name in ("mat2", "other", "tensor") if n.arg(name) is not None)


#: namespaces whose operators the names in RULES mean
_NAMESPACES = ("aten", "prims", "npu", "vllm_ir")

#: what an operator of ours declares -> its rule
DECLARED: dict[type, Callable[[Any], Rule]] = {
    batch.Pointwise: lambda said: _elementwise,
    batch.Reduces: lambda said: functools.partial(_reduced, name=said.dim),
    batch.Along: lambda said: functools.partial(_along, name=said.dim),
    batch.Product: lambda said: _product(said.a, said.b),
    batch.TransposedProduct: lambda said: functools.partial(_transposed_product, a=said.a, b=said.b),
    batch.GroupedProduct: lambda said: functools.partial(_grouped, a=said.a, b=said.b),
    batch.Attention: lambda said: functools.partial(_attention, query=said.query, key=said.key, value=said.value),
    batch.PagedAttention: lambda said: functools.partial(_paged_attention, query=said.query),
    batch.PerToken: lambda said: functools.partial(_per_token, own=said.own),
    batch.Experts: lambda said: functools.partial(_experts, x=said.x, per_token=said.per_token),
    batch.Combines: lambda said: functools.partial(_combined_experts, x=said.x, weights=said.weights),
    batch.Normalises: lambda said: _normalised(lambda n, rank: said.start),
    batch.Resizes: lambda said: _resized,
    batch.BySize: lambda said: _by_size,
}


def rule_of(target: OpOverload) -> Rule:
    """What `target` does with the rows: an operator of ours says it itself, another's stands in `RULES`."""
    name = target._overloadpacket.__name__
    if target.namespace == NAMESPACE:
        said = BATCH[name]
        return DECLARED[type(said)](said)
    if target.namespace in _NAMESPACES:
        found = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if found is not None:
            return found
        if is_pointwise(target):
            return _elementwise
    return _by_size
