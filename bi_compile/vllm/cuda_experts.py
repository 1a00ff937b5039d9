"""vLLM's mixtures of experts on CUDA: its Triton kernel, in tiles that were compared, and a token's experts added up in one order.

vLLM chooses the kernel's tile by how many tokens there are. The kernel never splits K, so tiles may well add up in the same order: each
one that vLLM would choose for a layer's shape is compared with `REFERENCE` on this device when the model is loaded, bit by bit, and
where one differs `REFERENCE` takes its place. vLLM adds up the experts of a token by a kernel for 2, 3 and 4 of them and by `at::sum`
otherwise, whose order nothing fixes; `sum_experts` does it here.

Measured on one H200 (vLLM 0.23.0; tests/vllm/experts_on_cuda.py): tokens that differ in any bit from the same token alone in batches of up
to 4,096: 0, and all tiles that vLLM chooses have the reference's bits; routers with softmax, sigmoid and groups: 0, of equal scores the
lowest index first.

What vLLM runs within its operator for a mixture (`vllm::moe_forward`) is judged there, operator by operator and launch by launch, while
the engine warms up. So a router or a backend that is not known stops the start with the name of what it called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from ..errors import HostError
from .experts import check_data_parallel, check_routing, mixtures
from .shared import attribute

log = init_logger("vllm.plugins.bi_compile")

LAYERS = "vllm.model_executor.layers.fused_moe"
REFERENCE: Mapping[str, int] = {
    "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "SPLIT_K": 1, "num_warps": 4, "num_stages": 4,
}  # fmt: skip
"""The tile whose order of sums the others are held to, and that stands in for one that has another."""
ROWS = 512
"""Tokens up to which a tile is compared, or the fewest that it is for."""
_REMEDY = 'write kernel_config={"moe_backend": "triton"}'
Tile = Mapping[str, int]
Shape = tuple[tuple[int, ...], tuple[int, ...], int, "str | None"]
"""Sizes of both weights, how many experts a token has, and vLLM's name of the dtype: it has one for float32 alone."""
_same: dict[Shape, set[frozenset[tuple[str, int]]]] = {}
"""The tiles that have the reference's bits in every dtype that was compared."""
_compared: set[tuple[Shape, torch.dtype]] = set()


def before_config(vllm_config: Any) -> None:
    """Ask for vLLM's Triton kernel.

    Raises:
        HostError: a setting with which experts are computed by something else.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model is None or not model.is_moe:
        return
    if parallel.enable_expert_parallel:
        raise HostError(
            "enable_expert_parallel=True: experts that are divided among ranks were not tried; remove that line: tensor_parallel_size divides "
            "each expert"
        )
    check_data_parallel(vllm_config)
    kernels = vllm_config.kernel_config
    if kernels.moe_backend not in ("auto", "triton"):
        raise HostError(
            f"moe_backend={kernels.moe_backend!r}: of vLLM's kernels for experts only its Triton kernel is known to keep the order of its sums; "
            f"{_REMEDY} or remove that line"
        )
    if model.quantization is None:
        kernels.moe_backend = "triton"


# -- the tile ---------------------------------------------------------------------------------------------------------


def _key(tile: Tile) -> frozenset[tuple[str, int]]:
    return frozenset(tile.items())


def pinned(plain: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
    """`try_get_optimal_moe_config`, which gives `REFERENCE` unless its own tile was found to have the same bits."""

    @functools.wraps(plain)
    def choose(w1_shape: Any, w2_shape: Any, top_k: int, dtype: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
        tile = plain(w1_shape, w2_shape, top_k, dtype, *args, **kwargs)
        known = _same.get((tuple(w1_shape), tuple(w2_shape), top_k, dtype), ())
        return tile if _key(tile) in known else dict(REFERENCE)

    choose.__dict__["plain"] = plain
    return choose


def chosen_tiles(choose: Callable[[int], Tile], most: int) -> dict[frozenset[tuple[str, int]], tuple[int, int]]:
    """The tiles that are chosen for 1 to `most` tokens, each with the fewest and the most."""
    found: dict[frozenset[tuple[str, int]], tuple[int, int]] = {}
    for tokens in range(1, most + 1):
        key = _key(choose(tokens))
        found[key] = (found.get(key, (tokens, 0))[0], tokens)
    return found


class _Products:
    """Both products of a mixture by vLLM's Triton kernel, on data that shows another order of sums, as its layer calls them."""

    def __init__(self, w13: Tensor, w2: Tensor, biases: list[Tensor | None], top_k: int, rows: int, kind: str) -> None:
        from ..kernels.cuda import proof

        self.top_k, self.biases = top_k, biases
        experts, device = w13.shape[0], w13.device
        random = torch.Generator(device).manual_seed(0)
        self.ids = torch.rand(rows, experts, device=device, generator=random).argsort(-1)[:, :top_k].int().contiguous()
        self.scale = torch.rand(rows, top_k, device=device, generator=random)
        self.operands: list[tuple[Tensor, Tensor]] = []
        for weight, height in ((w13, rows), (w2, rows * top_k)):
            problem = proof.Problem(weight.shape[1], weight.shape[2], weight.dtype, device, by_column=True, form=0)
            x, (b,), _ = proof.operands(problem, kind, height)
            # every expert has the same weight: what is compared is the order
            self.operands.append((x.contiguous(), b.t().contiguous().expand(experts, -1, -1)))

    def run(self, tile: Tile, rows: int) -> list[Tensor]:
        """The products of the first `rows` tokens."""
        import triton.language as tl

        kernels = importlib.import_module(f"{LAYERS}.fused_moe")
        (x1, w13), (x2, w2) = self.operands
        ids, k = self.ids[:rows].contiguous(), self.top_k
        places = kernels._prepare_expert_assignment(ids, tile, rows, k, w13.shape[0], None)
        kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[x1.dtype]
        outs = []
        for x, weight, scale, bias, width in (
            (x1[:rows], w13, None, self.biases[0], k),
            (x2[: rows * k], w2, self.scale[:rows].contiguous(), self.biases[1], 1),
        ):
            out = torch.full((rows, k, weight.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
            kernels.invoke_fused_moe_triton_kernel(
                x, weight, out, None, None, scale, *places, scale is not None, width, dict(tile), compute_type=kind, use_fp8_w8a8=False,
                use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, block_shape=None, B_bias=bias,
            )  # fmt: skip
            outs.append(out)
        return outs


def compare(
    w13: Tensor, w2: Tensor, biases: list[Tensor | None], top_k: int, tiles: Mapping[frozenset[tuple[str, int]], tuple[int, int]]
) -> set[frozenset[tuple[str, int]]]:  # fmt: skip
    """Of `tiles`, each with the fewest and the most tokens that it is for, those that give every element the reference's bits.

    One that needs more shared memory than there is is none of them.
    """
    from triton.runtime.errors import OutOfResources

    from ..kernels.cuda import proof

    heights = {tile: sorted({low, max(low, min(high, ROWS))}) for tile, (low, high) in tiles.items()}
    good = set(tiles)
    for kind in proof.KINDS:
        products = _Products(w13, w2, biases, top_k, max(itertools.chain(*heights.values())), kind)
        want = products.run(REFERENCE, products.ids.shape[0])
        for tile, rows in itertools.product(tiles, range(2)):
            n = heights[tile][rows % len(heights[tile])]
            try:
                got = products.run(dict(tile), n)
            except OutOfResources:
                good.discard(tile)
                continue
            if not all(proof.same_bits(a, b[:n]) for a, b in zip(got, want, strict=True)):
                good.discard(tile)
    return good


# -- the layers -------------------------------------------------------------------------------------------------------


def check_model(vllm_config: Any) -> None:
    """Every mixture of experts is computed by vLLM's Triton kernel, and its tiles are compared.

    Raises:
        HostError: one that is not.
    """
    check_routing(vllm_config)
    for name, layer in mixtures(vllm_config):
        method = getattr(layer, "quant_method", None) or layer._quant_method
        if type(method).__name__ != "UnquantizedFusedMoEMethod":
            raise HostError(
                f"{name} has quantised experts ({type(method).__name__}), about which nothing is known: serve one whose experts are "
                "not quantised"
            )
        experts = method.moe_kernel.fused_experts
        if type(experts).__name__ != "TritonExperts":
            raise HostError(
                f"{name} has its experts computed by {type(experts).__name__}, whose order of sums is not known: {_REMEDY}"
            )
        held = getattr(layer, "routed_experts", layer)  # newer versions keep the weights apart
        dtype = experts.quant_config.config_name(held.w13_weight.dtype)
        compare_layer(held, layer.router.top_k, dtype, vllm_config.scheduler_config.max_num_batched_tokens)


def compare_layer(held: Any, top_k: int, dtype: str | None, most: int) -> None:
    """Compare the tiles that vLLM would choose for 1 to `most` tokens, unless a layer of the same sizes had them compared.

    held: what has the weights; dtype: vLLM's name of theirs.
    """
    w13, w2 = held.w13_weight, held.w2_weight
    shape = (tuple(w13.shape), tuple(w2.shape), top_k, dtype)
    if (shape, w13.dtype) in _compared:
        return
    began = time.perf_counter()
    plain = importlib.import_module(f"{LAYERS}.experts.triton_moe").try_get_optimal_moe_config.plain
    tiles = chosen_tiles(lambda tokens: plain(w13.shape, w2.shape, top_k, dtype, tokens), most)
    biases = [getattr(held, bias, None) for bias in ("w13_bias", "w2_bias")]
    with torch.inference_mode(), torch.cuda.device(w13.device):
        good = compare(w13, w2, biases, top_k, tiles)
        torch.cuda.empty_cache()
    _same[shape] = _same.get(shape, good) & good
    _compared.add((shape, w13.dtype))
    log.info(
        "bi_compile: %d of %d tiles of vLLM's kernel for experts have the same bits (%s experts of %s and %s); comparing them took %.1f s",
        len(good), len(tiles), w13.shape[0], tuple(w13.shape[1:]), tuple(w2.shape[1:]), time.perf_counter() - began,
    )  # fmt: skip


@contextlib.contextmanager
def experts_pinned() -> Iterator[None]:
    """vLLM's Triton experts take tiles that were compared and add up in one order; what runs within a mixture is judged."""
    from . import worker

    triton_moe = importlib.import_module(f"{LAYERS}.experts.triton_moe")
    runner = importlib.import_module(f"{LAYERS}.runner.moe_runner").MoERunner
    forward = runner._forward_impl

    def moe_sum(self: Any, input: Tensor, output: Tensor, topk_ids: Any = None, expert_map: Any = None) -> None:
        from ..kernels.triton.experts import sum_experts

        if expert_map is not None:
            raise HostError("experts that are divided among ranks were not tried")
        sum_experts(input.contiguous(), output)

    @functools.wraps(forward)
    def judged(self: Any, *args: Any, **kwargs: Any) -> Any:
        return worker.judge_within(forward, self, *args, **kwargs)

    with (
        attribute(triton_moe, "try_get_optimal_moe_config", pinned(triton_moe.try_get_optimal_moe_config)),
        attribute(triton_moe.TritonExperts, "moe_sum", moe_sum),
        attribute(runner, "_forward_impl", judged),
    ):
        yield
