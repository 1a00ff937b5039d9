"""What each operator of ours declares about the batch (`@operator(…, batch=…)`), against its results' sizes.

Every dimension of a call has a size of its own, so that the size says what became of it.
"""

from typing import Any

import pytest
import torch
from support import graph_of

from bi_compile import ops
from bi_compile.audit.batch_dims import follow
from bi_compile.audit.batch_rules import DECLARED

X = torch.zeros
B, M, K, N, G = 2, 7, 5, 11, 3
#: operator -> its arguments, the sizes that are combined, and those of which one element is taken
CALLS: dict[str, tuple[tuple[Any, ...], set[int], set[int]]] = {
    "mm": ((X(M, K), X(K, N)), {K}, set()),
    "mm_segments": ((X(M, K), X(K, N), 1), {K}, set()),
    "addmm": ((X(M, N), X(M, K), X(K, N)), {K}, set()),
    "bmm": ((X(B, M, K), X(B, K, N)), {K}, set()),
    "bmm_transposed": ((X(B, M, K), X(B, K, N)), {K}, set()),
    "baddbmm": ((X(N), X(B, M, K), X(B, K, N)), {K}, set()),
    "grouped_mm": ((X(M, K), X(G, K, N), torch.zeros(G, dtype=torch.int32)), {K}, {G}),
    "moe_gate": ((X(M, K), 3), {K}, set()),
    "moe_combine": ((X(M * G, N), torch.zeros(M * G, dtype=torch.int32), X(M, G)), {G}, {M * G}),
    "scaled_dot_product_attention": (
        (X(B, G, M, K), X(B, G, N, K), X(B, G, N, 13), X(B, 1, M, N)),
        {K, N},
        {13},  # of the values' features the logsumexp has none
    ),
    "paged_attention": (
        (
            X(M, 4, K),
            X(8, 16, B, K),
            X(8, 16, B, 13),
            torch.zeros(B, N, dtype=torch.int32),
            torch.zeros(N, 9, dtype=torch.int32),
        ),
        {K, B, 8, 16, 13, N, 9},
        set(),
    ),
    "sequence_attention_backward": ((*[X(B, 4, M, K)] * 2, *[X(B, 4, M, K)] * 3, X(B, 4, M)), set(), set()),
    "moe_experts": (
        (X(M, K), X(G, 2 * N, K), X(G, K, N), torch.zeros(M, B, dtype=torch.int64), X(M, B), "silu"),
        {K, N, 2 * N, B},
        {G},
    ),
    "latent_key": (
        (X(M, K + 4), X(K), X(M, 4), X(M, 4), torch.zeros(M, dtype=torch.int64), X(8, 16, 4), X(8, 16, K), 1e-6),
        {K, K + 4, 4, 8, 16},
        set(),
    ),
    "rms_norm": ((X(M, G, K), None, 1e-6), {K}, set()),
    "add_rms_norm": ((X(M, K), X(M, K), None, 1e-6), {K}, set()),
    "qk_norm": ((X(M, 4 * K), X(K), X(K), 2, 1, 1e-6), {K, 4 * K}, set()),
    "layer_norm": ((X(M, K), None, None, 1e-6), {K}, set()),
    "group_norm": ((X(M, 15, N), None, None, 5, 1e-6), {15, N}, set()),
    "pointwise": (("aten.hypot.default", [X(M, K), X(K)]), set(), set()),
    "tanh": ((X(M, K),), set(), set()),
    "sum": ((X(M, K, N), [1]), {K}, set()),
    "mean": ((X(M, K), []), {M, K}, set()),
    "var_mean": ((X(M, K, N), [0, 2]), {M, N}, set()),
    "logsumexp": ((X(M, K), [-1], True), {K}, set()),
    "softmax": ((X(M, K), -1), {K}, set()),
    "log_softmax": ((X(M, K), 0), {M}, set()),
    "cumsum": ((X(M, K), 1), {K}, set()),
    "topk": ((X(M, K), 3), {K}, set()),
    "amax": ((X(M, K, N), [1]), {K}, set()),
    "amin": ((X(M, K), []), {M, K}, set()),
    "index_put": ((X(M, K), [torch.zeros(M, dtype=torch.int64)], X(M, K)), set(), set()),
    "index_copy": ((X(M, K), 0, torch.zeros(M, dtype=torch.int64), X(M, K)), set(), set()),
    "scatter": ((X(M, K), 1, torch.zeros(M, K, dtype=torch.int64), X(M, K)), set(), set()),
    "all_reduce": ((X(M, K), "sum", "group"), set(), set()),
    "all_reduce_tree": ((X(M, K), "group"), set(), set()),
    "reduce_scatter": ((X(M, K), "sum", 1, "group"), set(), set()),
}


def test_every_operator_declares_how_the_batch_flows() -> None:
    assert {*CALLS, "sequence_attention"} == ops.OPERATORS.keys() == ops.BATCH.keys()
    assert {type(said) for said in ops.BATCH.values()} == DECLARED.keys()


@pytest.mark.parametrize("name", CALLS)
def test_the_rows_go_where_it_says(name: str) -> None:
    args, combined, taken = CALLS[name]
    gm, inputs, (node,) = graph_of((ops.OPERATORS[name], args, {}))
    values = node.meta["val"]
    result = values if isinstance(values, torch.Tensor) else values[0]
    for i, x in enumerate(inputs):
        for dim, size in enumerate(x.shape):
            found = follow(gm.graph, {f"x{i}": dim})
            assert (node in found.mixed) == (size in combined), (i, dim, found.mixed)
            if size not in combined and size not in taken and size != 1:
                want = tuple(d for d, n in enumerate(result.shape) if n == size)
                assert want and found.dims(node) == want, (i, dim)
            elif size in taken and size not in result.shape:
                assert found.dims(node) == (), (i, dim)


def test_a_length_is_the_querys_own_and_combined_in_the_keys() -> None:
    """Of sequence_attention, where both have one size."""
    args = X(B, 4, M, K), X(B, G, M, K), X(B, G, M, K)
    gm, _, (node,) = graph_of((ops.OPERATORS["sequence_attention"], args, {}))
    for i in range(3):
        for dim in range(4):
            found = follow(gm.graph, {f"x{i}": dim})
            assert (node in found.mixed) == (dim == 3 if i == 0 else dim == 2 or (i, dim) == (1, 3)), (i, dim)
    assert follow(gm.graph, {"x0": 0}).dims(node) == (0,) and follow(gm.graph, {"x0": 2}).dims(node) == (2,)


def test_a_ranks_share_of_the_rows_is_rows() -> None:
    """Of 8 rows 2 ranks have 4 each: in a graph of static shapes the size does not say it."""
    gm, _, (node,) = graph_of((ops.OPERATORS["reduce_scatter"], (X(8, K), "sum", 2, "group"), {}))
    assert follow(gm.graph, {"x0": 0}).dims(node) == (0,)


def test_addbmm_adds_up_the_batches() -> None:
    gm, _, (node,) = graph_of((torch.ops.aten.addbmm.default, (X(M, N), X(B, M, K), X(B, K, N)), {}))
    assert all(node in follow(gm.graph, {f"x{i}": 0}).mixed for i in (1, 2))
