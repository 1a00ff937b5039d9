"""Product and all-reduce over real processes (gloo): rows equal for every batch size, with 1, 2 and 4 ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.multiprocessing as mp

from bi_compile import ops

ROWS = (1, 2, 3, 5, 16, 17, 64)


def row_parallel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A row-parallel linear layer: each rank has a part of K."""
    return funcol.all_reduce(x @ w, "sum", dist.group.WORLD)


def scattered(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return funcol.reduce_scatter_tensor((x @ w).t().contiguous(), "sum", 0, dist.group.WORLD).t()


def rank_main(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            compare(rank, ranks, dtype)
            compare_segments(rank, ranks, dtype)
    finally:
        dist.destroy_process_group()


def in_segments(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The same, in one order for every number of ranks up to 4."""
    total = ops.mm_segments(x, w, 4 // dist.get_world_size())
    return ops.all_reduce_tree(total, dist.group.WORLD.group_name).to(x.dtype)


def compare(rank: int, ranks: int, dtype: torch.dtype) -> None:
    import bi_compile

    torch.manual_seed(0)
    k, n = 768 // ranks, 128
    x, w = torch.randn(max(ROWS), 768).to(dtype), torch.randn(768, n).to(dtype)
    mine = slice(rank * k, (rank + 1) * k)
    for fn in (row_parallel, scattered):
        compiled = torch.compile(fn, backend="bi_ascend", options={"inner": "eager"}, dynamic=True)
        whole = compiled(x[:, mine].contiguous(), w[mine])
        wide = (x.double() @ w.double())[:, : whole.shape[1]] if ranks == 1 or fn is row_parallel else None
        if wide is not None:
            torch.testing.assert_close(whole.double(), wide, rtol=2e-2, atol=0.5)
        for m in ROWS:
            for start in {0, max(ROWS) - m}:
                part = compiled(x[start : start + m, mine].contiguous(), w[mine])
                assert torch.equal(part, whole[start : start + m]), (fn.__name__, ranks, m, start)
    with bi_compile.invariant():
        eager = [row_parallel(x[:m, mine].contiguous(), w[mine]) for m in ROWS]
        assert all(torch.equal(e, eager[-1][:m]) for m, e in zip(ROWS, eager, strict=True))
    # every rank holds the same bits
    everyone = [torch.empty_like(eager[-1]) for _ in range(ranks)]
    dist.all_gather(everyone, eager[-1])
    assert all(torch.equal(everyone[0], e) for e in everyone)


def compare_segments(rank: int, ranks: int, dtype: torch.dtype) -> None:
    """Against one process that has all of K."""
    torch.manual_seed(0)
    k = 768 // ranks
    x, w = torch.randn(max(ROWS), 768).to(dtype), torch.randn(768, 128).to(dtype)
    own, part = x[:, rank * k : (rank + 1) * k].contiguous(), w[rank * k : (rank + 1) * k]
    alone = ops.mm_segments(x, w, 4).to(dtype)
    compiled = torch.compile(in_segments, backend="bi_ascend", options={"inner": "eager"}, dynamic=True)
    for m in ROWS:
        assert torch.equal(compiled(own[:m], part).view(torch.uint8), alone[:m].view(torch.uint8)), (ranks, m)
        assert torch.equal(in_segments(own[-m:], part), alone[-m:]), (ranks, m)
    # a row of an embedding, which the last rank has
    row = torch.tensor([[-0.0, 1.5, float("-inf")]], dtype=dtype).view(torch.int8)
    mine = row if rank == ranks - 1 else torch.zeros_like(row)
    assert torch.equal(ops.all_reduce(mine, "sum", dist.group.WORLD.group_name), row)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_product_and_collective_rows_are_equal_for_every_batch_size(ranks: int, tmp_path: Path) -> None:
    mp.spawn(rank_main, (ranks, str(tmp_path)), nprocs=ranks, join=True)


def test_the_sum_is_in_rank_order_and_rounded_once() -> None:
    from bi_compile.ops.collective import _in_rank_order

    parts = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [-1.0]]).bfloat16()
    assert _in_rank_order(parts, "sum").item() == 2.0**-8
    assert _in_rank_order(parts, "avg").item() == 2.0**-10


def test_a_reduction_that_has_no_order_stays() -> None:
    from bi_compile.passes.matmul_allreduce import _order_free

    assert _order_free(torch.ones(1), "max", "g") and _order_free(torch.ones(1, dtype=torch.int32), "sum", "g")
    assert not _order_free(torch.ones(1), "sum", "g")
