"""What can be said of Ascend without torch_npu: chips, versions, and the replacements' arithmetic on the CPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from bi_compile import HostError
from bi_compile.passes import add_rms_norm, npu_attention, npu_mla, npu_moe
from bi_compile.targets import acl_graph, ascend


@pytest.mark.parametrize(
    "chip, name",
    [
        ("Ascend910B2", "ascend-a2"),
        ("Ascend910B4-1", "ascend-a2"),
        ("Ascend910_9391", "ascend-a3"),
        ("Ascend950PR_9599", "ascend-950"),
    ],
)
def test_a_chip_is_found_by_the_name_that_acl_gives_it(chip: str, name: str) -> None:
    assert ascend.of_chip(chip).name == name


@pytest.mark.parametrize(
    "chip, remedy", [("Ascend310P3", "use an Atlas A2, A3 or Ascend 950"), ("Ascend910ProB", "unknown chip")]
)
def test_other_chips_are_refused(chip: str, remedy: str) -> None:
    with pytest.raises(HostError, match=remedy):
        ascend.of_chip(chip)


def test_torch_and_torch_npu_have_to_be_of_one_release() -> None:
    ascend.check_versions("2.13.0+cpu", "2.13.0.post2")
    with pytest.raises(HostError, match=r"pip install torch-npu==2\.13\.0, or torch==2\.10\.0"):
        ascend.check_versions("2.13.0+cpu", "2.10.0.post4")


def test_without_torch_npu_the_target_says_what_to_install() -> None:
    with pytest.raises(HostError, match="pip install torch-npu"):
        ascend.of_this_machine()


def test_importing_the_package_needs_no_torch_npu() -> None:
    code = "import sys; sys.modules['torch_npu'] = None; import bi_compile, bi_compile.targets.ascend, bi_compile.passes; print('ok')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "ok", run.stderr


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[L, H, D] by [S, H, D]; the last query sees every key."""
    length, count = q.shape[0], k.shape[0]
    scores = torch.einsum("lhd,shd->hls", q.double(), k.double()) / q.shape[-1] ** 0.5
    hidden = torch.arange(count)[None] > torch.arange(count - length, count)[:, None]
    return torch.einsum("hls,shd->lhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.double())


def paged(requests: list[tuple[int, int]], heads: int = 2, size: int = 8, block: int = 16) -> dict[str, object]:
    """Requests of (queries, keys): prefill, chunked prefill and decode, in pages."""
    pages = [-(-n // block) for _, n in requests]
    table = torch.zeros(len(requests), max(pages), dtype=torch.int32)
    order = torch.randperm(sum(pages))
    for i, n in enumerate(pages):
        table[i, :n] = order[sum(pages[:i]) : sum(pages[: i + 1])]
    return {
        "query": torch.randn(sum(n for n, _ in requests), heads, size),
        "key": torch.randn(sum(pages), block, heads * size),
        "value": torch.randn(sum(pages), block, heads * size),
        "block_table": table,
        "actual_seq_lengths": torch.tensor([n for n, _ in requests]).cumsum(0).tolist(),
        "actual_seq_lengths_kv": [n for _, n in requests],
        "num_heads": heads, "num_key_value_heads": heads, "scale": size**-0.5, "block_size": block, "input_layout": "TND",
        "sparse_mode": 3, "atten_mask": torch.ones(1, dtype=torch.bool),
    }  # fmt: skip


def test_attention_of_prefill_chunk_and_decode_in_one_batch() -> None:
    """Right, and for each request the bits that it has alone."""
    requests = [(1, 40), (7, 7), (1, 3), (5, 33)]
    given = paged(requests)
    out, _ = npu_attention.fused_infer_attention_score(**given)
    start = 0
    for i, (length, count) in enumerate(requests):
        blocks = given["block_table"][i, : -(-count // 16)].long()
        k, v = (given[name][blocks].reshape(-1, 2, 8)[:count] for name in ("key", "value"))
        mine = slice(start, start + length)
        assert torch.allclose(out[mine].double(), causal(given["query"][mine], k, v), atol=1e-5)
        alone = given | {
            "query": given["query"][mine], "block_table": given["block_table"][i : i + 1],
            "actual_seq_lengths": [length], "actual_seq_lengths_kv": [count],
        }  # fmt: skip
        assert torch.equal(npu_attention.fused_infer_attention_score(**alone)[0], out[mine])
        start += length
    into = [torch.empty_like(out), torch.empty(1)]
    npu_attention.fused_infer_attention_score_out(**given, out=into, workspace=None)
    assert torch.equal(into[0], out)


@pytest.mark.parametrize(
    "argument",
    [
        {"input_layout": "BSH"},
        {"sparse_mode": 2},
        {"antiquant_mode": 1},
        {"pre_tokens": 128},
        {"pse_shift": torch.zeros(3)},
    ],
)
def test_attention_refuses_by_name_what_it_has_no_form_for(argument: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(argument))):
        npu_attention.fused_infer_attention_score(**(paged([(1, 3)]) | argument))


def test_a_band_is_what_each_query_sees() -> None:
    """pre_tokens and next_tokens count from the query's own position; torch_npu's documentation makes the mask of two triangles."""
    given = paged([(3, 40), (5, 5)])
    out, lse = npu_attention.fused_infer_attention_score(
        **given | {"sparse_mode": 4, "pre_tokens": 6, "next_tokens": 1, "softmax_lse_flag": True}
    )
    blocks = given["block_table"][0, :3].long()
    k, v = (given[name][blocks].reshape(-1, 2, 8)[:40].transpose(0, 1) for name in ("key", "value"))
    shape = torch.ones(3, 40, dtype=torch.bool)
    seen = shape.tril(37 + 1) & shape.triu(37 - 6)
    q = given["query"][:3].transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    assert torch.allclose(out[:3].transpose(0, 1), want, atol=1e-5)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    assert lse.shape == (8, 2, 1) and torch.allclose(lse[:3, :, 0].t(), scores.logsumexp(-1), atol=1e-5)


def test_a_request_without_keys_gives_zero_and_an_infinite_logsumexp() -> None:
    given = paged([(1, 0), (0, 5), (2, 7)])
    out, lse = npu_attention.fused_infer_attention_score(**given, softmax_lse_flag=True)
    assert not out[0].any() and (lse[0] == torch.inf).all() and lse[1:].isfinite().all()


def test_a_cache_with_heads_before_the_pages_rows_is_the_same() -> None:
    """CANN's BnNBsD, by its sizes."""
    given = paged([(1, 40), (3, 7)])
    want = npu_attention.fused_infer_attention_score(**given)[0]
    heads_first = {n: given[n].unflatten(2, (2, 8)).transpose(1, 2).contiguous() for n in ("key", "value")}
    assert torch.equal(npu_attention.fused_infer_attention_score(**given | heads_first)[0], want)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"actual_seq_lengths_kv": [49]}, "a request has 49 keys, and block_table names 3 pages of 16"),
        ({"actual_seq_lengths": [1, 2]}, "names 2 requests, actual_seq_lengths_kv 1, and block_table 1 rows"),
        ({"actual_seq_lengths": [2]}, "more than the 1 tokens of query"),
        ({"block_size": 32}, r"a cache with block_size=32 and 2 key heads is \[blocks"),
    ],
)
def test_lengths_and_pages_that_do_not_fit_are_a_sentence(argument: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        npu_attention.fused_infer_attention_score(**paged([(1, 40)]) | argument)


def test_a_page_beyond_the_cache_is_an_error_on_the_cpu() -> None:
    given = paged([(1, 40)])
    given["block_table"][0, 1] = 77
    with pytest.raises(IndexError, match="77"):
        npu_attention.fused_infer_attention_score(**given)


def test_experts_products_are_those_of_each_row_alone() -> None:
    x, w = torch.randn(9, 32), torch.randn(3, 32, 16)
    arguments = {"split_item": 2, "group_type": 0, "group_list_type": 1}
    [out] = npu_moe.grouped_matmul([x], [w], group_list=torch.tensor([4, 0, 5]), **arguments)
    assert torch.allclose(out, torch.cat([x[:4] @ w[0], x[4:] @ w[2]]), atol=1e-5)
    [cumulative] = npu_moe.grouped_matmul(
        [x], [w], group_list=torch.tensor([4, 4, 9]), **arguments | {"group_list_type": 0}
    )
    assert torch.equal(out, cumulative)
    [alone] = npu_moe.grouped_matmul([x[6:7]], [w], group_list=torch.tensor([0, 0, 1]), **arguments)
    assert torch.equal(alone, out[6:7])
    with pytest.raises(NotImplementedError, match="antiquant_scale"):
        npu_moe.grouped_matmul([x], [w], group_list=torch.tensor([4, 0, 5]), antiquant_scale=[w], **arguments)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
@pytest.mark.parametrize("mode", [None, 0, 2, 3])
def test_attention_of_pytorchs_models_means_what_it_says(layout: str, mode: int | None) -> None:
    """Heads of keys shared by two of queries; the mask names what is not seen; largest score and sum give the softmax."""
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    hidden = torch.rand(2, 1, 5, 7) > 0.6
    hidden[..., 0] = False
    there = {
        "BNSD": lambda x: x, "BSND": lambda x: x.transpose(1, 2), "BSH": lambda x: x.transpose(1, 2).flatten(2),
        "SBH": lambda x: x.permute(2, 0, 1, 3).flatten(2),
    }[layout]  # fmt: skip
    seen = {
        None: torch.ones(5, 7, dtype=torch.bool),
        0: ~hidden,
        2: torch.ones(5, 7).tril().bool(),
        3: torch.ones(5, 7).tril(2).bool(),
    }
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen[mode], scale=0.3, enable_gqa=True)
    mask = {None: None, 0: hidden}.get(mode, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    out, largest, total, *_ = npu_attention.fusion_attention_v3(
        there(q), there(k), there(v), 4, layout, None, None, mask, 0.3, sparse_mode=mode or 0
    )
    assert torch.allclose(out, there(want), atol=1e-5) and out.is_contiguous()
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen[mode], float("-inf"))
    weights = (scores - largest[..., :1]).exp() / total[..., :1]
    assert largest.shape == (2, 4, 5, 8) and torch.allclose(weights, scores.softmax(-1), atol=1e-5)
    assert len(npu_attention.fusion_attention(there(q), there(k), there(v), 4, layout)) == 7


@pytest.mark.parametrize(
    "argument",
    [
        {"keep_prob": 0.9},
        {"next_tockens": 0},
        {"pre_tockens": 0},
        {"pse": torch.zeros(3)},
        {"sparse_mode": 4},
        {"input_layout": "TND"},
    ],
)
def test_attention_of_pytorchs_models_refuses_by_name(argument: dict[str, Any]) -> None:
    x = torch.randn(2, 4, 5, 16)
    with pytest.raises(NotImplementedError, match=next(iter(argument))):
        npu_attention.fusion_attention(x, x, x, 4, **({"input_layout": "BNSD"} | argument))


def test_gate_and_sum_over_experts() -> None:
    x = torch.randn(6, 8)
    y, experts, rows = npu_moe.gating_top_k_softmax(x, None, 2)
    want, which = x.softmax(-1).topk(2)
    assert torch.allclose(y, want) and torch.equal(experts.long(), which)
    assert rows.tolist() == [[m, m + 6] for m in range(6)]
    # k_group, group_count, group_select_mode, renorm, norm_type, out_flag, routed_scaling_factor, eps
    renormalised, *_ = npu_moe.ascend_gating_top_k(x, 2, 1, 1, 1, 1, 0, False, 1.0, 1e-20)
    assert torch.allclose(renormalised.sum(-1), torch.ones(6))
    tokens, at = torch.randn(12, 16), torch.randperm(12)
    total = npu_moe.token_unpermute(tokens, at, y)
    assert torch.allclose(total, (tokens[at].view(6, 2, 16) * y[..., None]).sum(1), atol=1e-6)
    with pytest.raises(NotImplementedError, match="norm_type=2"):
        npu_moe.ascend_gating_top_k(x, 2, 1, 1, 1, 1, 2, False, 1.0, 1e-20)
    with pytest.raises(NotImplementedError, match="1 of 3 groups of 8 experts"):
        npu_moe.ascend_gating_top_k(x, 2, 1, 3, 1, 1, 1, False, 1.0, 1e-20)


@pytest.mark.parametrize("by_two", [0, 1])
@pytest.mark.parametrize("sigmoid", [0, 1])
def test_gate_with_groups_and_a_bias(sigmoid: int, by_two: int) -> None:
    """As DeepSeek-V3 writes it: the bias has a say in the choice, not in the weights. Rows alone have the bits they have together."""
    x, bias = torch.randn(33, 16), torch.randn(16) * 0.1
    gate = lambda rows: npu_moe.ascend_gating_top_k(rows, 3, 2, 4, by_two, 1, sigmoid, False, 2.5, 1e-20, bias)
    y, experts, scores_of_all = gate(x)
    alone = [gate(x[m : m + 1]) for m in range(len(x))]
    for m in range(len(x)):
        scores = x[m].sigmoid() if sigmoid else x[m].softmax(-1)
        groups = (scores + bias).view(4, 4)
        best = groups.topk(2).values.sum(-1) if by_two else groups.amax(-1)
        among = [4 * g + i for g in best.topk(2).indices.tolist() for i in range(4)]
        chosen = sorted(among, key=lambda e: -(scores + bias)[e].item())[:3]
        assert experts[m].tolist() == chosen
        weights = scores[chosen]
        assert torch.allclose(y[m], weights / weights.sum() * 2.5, atol=1e-6)
        assert all(torch.equal(a[0], b[m]) for a, b in zip(alone[m], (y, experts, scores_of_all), strict=True))


def test_equal_experts_and_groups_are_taken_in_their_order() -> None:
    y, experts, _ = npu_moe.ascend_gating_top_k(torch.zeros(3, 16), 4, 2, 4, 1, 1, 1, False, 1.0, 1e-20)
    assert experts.tolist() == [[0, 1, 2, 3]] * 3 and torch.equal(y, torch.full((3, 4), 0.25))


def latent(requests: list[tuple[int, int]], heads: int = 4) -> dict[str, Any]:
    """Latent attention of requests of (queries, keys): one key head, whose values are its keys; the rotated part apart."""
    one = paged(requests, heads=1, size=16)
    tokens, pages = sum(n for n, _ in requests), one["key"].shape[0]
    cache = one["key"].view(pages, 1, 16, 16)
    return {
        "query": torch.randn(tokens, heads, 16), "key": cache, "value": cache, "query_rope": torch.randn(tokens, heads, 8),
        "key_rope": torch.randn(pages, 1, 16, 8), "num_query_heads": heads, "num_key_value_heads": 1, "block_size": 16,
        "block_table": one["block_table"], "actual_seq_qlen": one["actual_seq_lengths"],
        "actual_seq_kvlen": one["actual_seq_lengths_kv"], "softmax_scale": 0.2, "input_layout": "TND_NTD", "sparse_mode": 3,
        "atten_mask": torch.ones(1, dtype=torch.bool),
    }  # fmt: skip


def test_latent_attention_in_its_layouts() -> None:
    """Right, and in BNSD_NBSD, BSND and TND, as vllm-ascend decodes, the bits of TND_NTD."""
    given = latent([(1, 40), (1, 7), (1, 1), (1, 0)])
    out, _ = npu_attention.fused_infer_attention_score_v2(**given)
    assert out.shape == (4, 4, 16)
    for i, count in enumerate((40, 7, 1)):
        blocks = given["block_table"][i, : -(-count // 16)].long()
        keys = torch.cat([given[n][blocks].reshape(-1, given[n].shape[-1])[:count] for n in ("key", "key_rope")], -1)
        scores = torch.cat([given["query"][i], given["query_rope"][i]], -1).double() @ keys.t().double() * 0.2
        assert torch.allclose(out[:, i].double(), scores.softmax(-1) @ keys[:, :16].double(), atol=1e-5)
    assert not out[:, 3].any()
    of_decode = {"actual_seq_qlen": None, "sparse_mode": 0, "atten_mask": None}
    views: dict[str, tuple[Any, Any]] = {
        "BNSD_NBSD": (lambda x: x.unsqueeze(2), lambda y: y.squeeze(2)),
        "BNSD": (lambda x: x.unsqueeze(2), lambda y: y.squeeze(2).transpose(0, 1)),
        "BSND": (lambda x: x.unsqueeze(1), lambda y: y.squeeze(1).transpose(0, 1)),
        "BSND_NBSD": (lambda x: x.unsqueeze(1), lambda y: y.squeeze(2)),
    }
    for layout, (there, back) in views.items():
        queries = {name: there(given[name]) for name in ("query", "query_rope")}
        y, _ = npu_attention.fused_infer_attention_score_v2(**given | of_decode | queries | {"input_layout": layout})
        assert torch.equal(back(y), out), layout
    y, lse = npu_attention.fused_infer_attention_score_v2(**given | {"input_layout": "TND", "return_softmax_lse": True})
    assert torch.equal(y.transpose(0, 1), out) and lse.shape == (4, 4, 1)


@pytest.mark.parametrize(
    "argument, words",
    [
        ({"learnable_sink": torch.zeros(4)}, "learnable_sink"),
        ({"query_quant_mode": 3}, "query_quant_mode"),
        ({"input_layout": "BSH"}, "input_layout='BSH'"),
        ({"input_layout": "BNSD", "block_table": None}, "input_layout='BNSD'"),
        ({"return_softmax_lse": True}, "the logsumexp in the layout TND_NTD"),
    ],
)
def test_latent_attention_refuses_by_name(argument: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"npu_fused_infer_attention_score_v2 with {words}"):
        npu_attention.fused_infer_attention_score_v2(**(latent([(1, 3)]) | argument))


@pytest.mark.parametrize(
    "argument, words",
    [
        ({"actual_seq_kvlen": None}, "takes the lengths of the requests' keys"),
        ({"actual_seq_kvlen": [3, 3]}, "names 1 requests, actual_seq_lengths_kv 2"),
        ({"actual_seq_kvlen": [17]}, "a request has 17 keys, and block_table names 1 pages of 16"),
        ({"actual_seq_kvlen": [-1]}, "lengths are negative"),
        ({"actual_seq_qlen": [2]}, "more than the 1 tokens of query"),
        ({"block_size": 8}, "a cache with block_size=8 and 1 key heads"),
    ],
)
def test_lengths_that_do_not_fit_are_a_sentence(argument: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        npu_attention.fused_infer_attention_score_v2(**(latent([(1, 3)]) | argument))


def test_a_page_beyond_the_cache_is_a_sentence() -> None:
    given = latent([(1, 3)])
    given["block_table"] = torch.tensor([[7]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"block_table names page 7 for key .*, and the cache has 1"):
        npu_attention.fused_infer_attention_score_v2(**given)


def test_a_captured_task_takes_the_lengths_of_its_update() -> None:
    """What vllm-ascend does around its graphs: a group in the capture, an update with other lengths before each replay."""
    requests = [(1, 40), (1, 7), (1, 3)]
    given, out = latent(requests), [torch.zeros(4, 3, 16), torch.zeros(1)]
    acl_graph.graph_task_group_begin(None)
    captured = acl_graph.lengths([1, 2, 3], [40, 7, 3], False, torch.device("cpu"))
    task = acl_graph.graph_task_group_end(None)
    assert task.lengths is captured and captured.shape == (2, 3)
    for keys, ends in (([40, 7, 3], [1, 2, 3]), ([5, 6], [1, 2])):
        acl_graph.graph_task_update_begin(None, task)
        changed = given | {"actual_seq_kvlen": keys, "actual_seq_qlen": ends}
        npu_attention.fused_infer_attention_score_v2_out(**changed, out=out, workspace=None)
        acl_graph.graph_task_update_end(None)
        more = 3 - len(keys)
        assert captured.tolist() == [ends + [ends[-1]] * more, keys + [0] * more]
    acl_graph.graph_task_update_begin(None, task)
    try:
        with pytest.raises(ValueError, match="names 4 requests, and 3 were captured"):
            wide = latent([*requests, (1, 1)])
            npu_attention.fused_infer_attention_score_v2_out(**wide, out=out, workspace=None)
    finally:
        acl_graph.graph_task_update_end(None)
    acl_graph.graph_task_group_begin(None)
    with pytest.raises(RuntimeError, match="without an attention operator that bi_compile replaces"):
        acl_graph.graph_task_group_end(None)


def test_the_layers_of_a_step_share_their_lengths() -> None:
    """Equal numbers are one tensor, other numbers another; what is traced is not kept."""
    cpu = torch.device("cpu")
    first = acl_graph.lengths([1, 2], [9, 7], False, cpu)
    assert acl_graph.lengths([1, 2], [9, 7], False, cpu) is first and first.tolist() == [[1, 2], [9, 7]]
    with torch._subclasses.FakeTensorMode():
        fake = acl_graph.lengths([1, 2], [9, 7], False, cpu)
        assert type(fake) is not torch.Tensor and type(acl_graph.zero(torch.ones(2))) is not torch.Tensor
    assert acl_graph.lengths([1, 2], [9, 7], False, cpu) is first
    assert acl_graph.lengths([1, 2], [9, 8], False, cpu).tolist() == [[1, 2], [9, 8]] and first.tolist()[1] == [9, 7]
    given = paged([(1, 3)])
    zeros = [npu_attention.fused_infer_attention_score(**given)[1] for _ in range(2)]
    assert zeros[0] is zeros[1] and zeros[0].tolist() == [0.0] and not zeros[0].is_inference()


def latent_keys(tokens: int, heads: int = 1) -> dict[str, Any]:
    """Keys of 8 + 4 elements in pages of 4."""
    return {
        "kv": torch.randn(tokens, heads, 1, 12), "gamma": torch.rand(8), "cos": torch.rand(tokens, 1, 1, 4), "sin": torch.rand(tokens, 1, 1, 4),
        "index": torch.arange(tokens).flip(0), "k_cache": torch.zeros(3, 4, heads, 4), "ckv_cache": torch.zeros(3, 4, heads, 8), "cache_mode": "PA",
    }  # fmt: skip


def test_a_latent_key_is_normalised_rotated_and_written() -> None:
    """As torch_npu documents npu_kv_rmsnorm_rope_cache and npu_interleave_rope; a negative slot is not written."""
    given = latent_keys(5)
    given["index"][1] = -1
    k_cache, ckv_cache, k, y = npu_mla.kv_rmsnorm_rope_cache(**given, epsilon=1e-6)
    assert k_cache is given["k_cache"] and ckv_cache is given["ckv_cache"]
    latent, pairs = given["kv"].double().split([8, 4], -1)
    want = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + 1e-6) * given["gamma"]
    turned = torch.cat([-pairs[..., 1::2], pairs[..., ::2]], -1) * given["sin"]
    turned += torch.cat([pairs[..., ::2], pairs[..., 1::2]], -1) * given["cos"]
    assert torch.allclose(y.double(), want, atol=1e-5) and torch.allclose(k.double(), turned, atol=1e-5)
    for cache, rows in ((k_cache, k), (ckv_cache, y)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[[4, 2, 1, 0]], rows[[0, 2, 3, 4], 0]) and not flat[3].any() and not flat[5:].any()


@pytest.mark.parametrize(
    "argument, words",
    [
        ({"cache_mode": "PA_NZ"}, "cache_mode='PA_NZ'"),
        ({"c_kv_scale": torch.ones(8)}, "c_kv_scale"),
        (latent_keys(5, heads=2), "2 heads of keys"),
    ],
)
def test_a_latent_key_refuses_by_name(argument: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"npu_kv_rmsnorm_rope_cache with {words}"):
        npu_mla.kv_rmsnorm_rope_cache(**(latent_keys(5) | argument))


def test_a_slot_beyond_the_cache_is_an_error_on_the_cpu() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        npu_mla.kv_rmsnorm_rope_cache(**latent_keys(2) | {"index": torch.tensor([0, 12])})


@pytest.mark.parametrize("order", [None, (1, 0, 2), (0, 1, 2), (2, 0, 1)])
def test_a_product_with_a_transposition(order: tuple[int, ...] | None) -> None:
    x, w = torch.randn(3, 5, 8), torch.randn(3, 8, 4)
    found = npu_mla.transpose_batchmatmul(x, w, perm_y=order)
    assert torch.allclose(found, (x @ w).permute(*(order or (1, 0, 2))), atol=1e-5) and found.is_contiguous()
    assert torch.equal(npu_mla.transpose_batchmatmul(x.transpose(0, 1), w, perm_x1=(1, 0, 2), perm_y=order), found)


def test_int8_products_stay_and_others_are_refused() -> None:
    entries = {e.operator: e for e in npu_moe.NpuMoe.entries}
    int8, half = torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.float16)
    assert entries["npu.npu_quant_matmul.default"].stays(int8, int8, torch.ones(4))
    assert entries["npu.npu_grouped_matmul.default"].stays([int8], [int8[None]], group_list=torch.tensor([4]))
    assert not entries["npu.npu_grouped_matmul.default"].stays([half], [int8[None]], group_list=torch.tensor([4]))
    fused = entries["_C_ascend.grouped_matmul_swiglu_quant_weight_nz.default"]
    assert fused.stays(int8, int8[None], torch.ones(1, 4), torch.ones(4), torch.tensor([4]))
    with pytest.raises(NotImplementedError, match="operands of torch"):
        fused.replacement(half, int8[None])


def test_fused_norms_keep_every_output() -> None:
    x, residual, gamma = torch.randn(5, 64), torch.randn(5, 64), torch.rand(64)
    s = x + residual
    y = torch.nn.functional.rms_norm(s, (64,), gamma, 1e-6)
    wide, same, rstd, new = add_rms_norm.npu_add_rms_norm_cast(x, residual, gamma)
    assert (
        torch.allclose(wide, y, atol=1e-5) and torch.equal(wide, same) and rstd.shape == (5, 1) and torch.equal(new, s)
    )
    scale, zero = torch.full((64,), 0.05), torch.full((64,), 3.0)
    first, second, _ = add_rms_norm.npu_add_rms_norm_quant(x, residual, gamma, scale, zero)
    assert first.dtype == torch.int8 and torch.equal(first, second)
    assert (first.float() - (y / 0.05 + 3).clamp(-128, 127)).abs().max() <= 0.51
    y1, y2, _, scale1, scale2 = add_rms_norm.npu_add_rms_norm_dynamic_quant(x, residual, gamma)
    assert (y1.float() * scale1[:, None] - y).abs().max() <= scale1.max() * 0.51 and y2.numel() == scale2.numel() == 0
    with pytest.raises(NotImplementedError, match="y_dtype"):
        add_rms_norm.npu_add_rms_norm_dynamic_quant(x, residual, gamma, y_dtype=290)


def test_product_and_all_reduce_refuses_quantisation_by_name() -> None:
    from bi_compile.passes.matmul_allreduce import npu_mm_all_reduce_base

    x = torch.randn(4, 4)
    with pytest.raises(NotImplementedError, match="dequant_scale, comm_quant_mode"):
        npu_mm_all_reduce_base(x, x, "hcom", dequant_scale=torch.ones(4), comm_quant_mode=1, antiquant_group_size=0)


def test_an_hccl_communicator_is_no_group_name() -> None:
    """`hcom` names HCCL's communicator; a process without that one is told so."""
    from bi_compile.passes.matmul_allreduce import _hccl_group

    with pytest.raises(RuntimeError, match="HCCL communicator 'unknown'"):
        _hccl_group("unknown")
