"""vLLM's mixtures of experts on a CUDA device: each token alone and among others, as vLLM computes it and pinned; routers too.

    python tests/vllm/experts_on_cuda.py

Prints for sizes of models which of vLLM's tiles have the reference's bits, how many tokens differ in any bit from the same token alone,
the relative error against float64, and microseconds by the number of tokens. For routers: how many tokens differ from the same alone,
and in how many equal scores were not taken lowest index first. bi_compile/vllm/cuda_experts.py rests on what differs nowhere.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import triton
import vllm._custom_ops as ops
from torch import Tensor
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from bi_compile.vllm import cuda_experts

#: name -> (experts, width of an expert, hidden size, experts of a token, activation, biases)
SIZES: dict[str, tuple[int, int, int, int, str, bool]] = {
    "Qwen3-30B-A3B": (128, 768, 2048, 8, "SILU", False),
    "Mixtral-8x7B, a half": (8, 7168, 4096, 2, "SILU", False),
    "gpt-oss-20b": (32, 2880, 2880, 4, "SWIGLUOAI", True),
    "DeepSeek-V2-Lite": (64, 1408, 2048, 6, "SILU", False),
    "Qwen1.5-MoE": (60, 1408, 2048, 4, "SILU", False),
    "odd": (12, 200, 328, 3, "GELU", False),
}
TOKENS, COMPARED = 4096, 64
HEIGHTS = [
    2,
    3,
    4,
    5,
    8,
    16,
    17,
    32,
    33,
    64,
    65,
    96,
    97,
    128,
    200,
    256,
    257,
    400,
    512,
    513,
    1000,
    1024,
    1536,
    2048,
    3000,
    4096,
]
TIMED = [1, 4, 16, 64, 256, 1024, 4096]


class Mixture:
    """Random weights and tokens, and how vLLM's Triton experts compute them."""

    def __init__(self, sizes: tuple[int, int, int, int, str, bool], dtype: torch.dtype) -> None:
        self.experts, width, hidden, self.k, activation, biased = sizes
        self.activation = MoEActivation[activation]

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, device="cuda").mul_(scale).to(dtype)

        self.w13, self.w2 = (
            draw(self.experts, 2 * width, hidden, scale=hidden**-0.5),
            draw(self.experts, hidden, width, scale=width**-0.5),
        )
        self.biases = [draw(self.experts, n) if biased else None for n in (2 * width, hidden)]
        self.x = draw(TOKENS, hidden)
        self.ids = torch.rand(TOKENS, self.experts, device="cuda").argsort(-1)[:, : self.k].int().contiguous()
        self.weights = torch.rand(TOKENS, self.k, device="cuda")
        self.module = object.__new__(TritonExperts)
        quant = moe_config.biased_moe_quant_config(*self.biases) if biased else moe_config.FUSED_MOE_UNQUANTIZED_CONFIG
        self.module.__dict__.update(quant_config=quant, quantization_emulation=False, _lora_context=None)

    @property
    def layer(self) -> Any:
        router = SimpleNamespace(top_k=self.k)
        return SimpleNamespace(
            w13_weight=self.w13, w2_weight=self.w2, w13_bias=self.biases[0], w2_bias=self.biases[1], router=router
        )

    def run(self, rows: Tensor) -> Tensor:
        return self.call(self.x[rows], self.ids[rows], self.weights[rows])

    def call(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, hidden = x.shape
        out, width = torch.empty_like(x), self.w13.shape[1]
        space = [x.new_empty(tokens * self.k * max(width, hidden)) for _ in range(2)]
        self.module.apply(
            out,
            x,
            self.w13,
            self.w2,
            weights,
            ids,
            self.activation,
            self.experts,
            None,
            None,
            None,
            *space,
            None,
            False,
        )
        return out

    def exact(self, rows: Tensor) -> Tensor:
        """In float64, without activations other than SILU."""
        out = torch.zeros(len(rows), self.x.shape[1], dtype=torch.float64, device="cuda")
        for n, row in enumerate(rows.tolist()):
            for e, weight in zip(self.ids[row].tolist(), self.weights[row].tolist(), strict=True):
                gate, up = (self.w13[e].double() @ self.x[row].double()).chunk(2)
                out[n] += weight * (self.w2[e].double() @ (torch.nn.functional.silu(gate) * up))
        return out


def differ(mixture: Mixture) -> str:
    """Of COMPARED tokens in batches of HEIGHTS, those that differ from the same alone."""
    chosen = torch.randperm(TOKENS, device="cuda")[:COMPARED]
    alone = torch.cat([mixture.run(row.view(1)) for row in chosen])
    wrong, rows = {}, 0
    for height in HEIGHTS:
        others = torch.randperm(TOKENS, device="cuda")
        batch = torch.cat([chosen, others[~torch.isin(others, chosen)]])[: max(height, 1)]
        if height < COMPARED:
            batch = chosen[torch.randperm(COMPARED, device="cuda")[:height]]
        batch = batch[torch.randperm(len(batch), device="cuda")]
        got = mixture.run(batch)
        for i, row in enumerate(chosen.tolist()):
            at = (batch == row).nonzero()
            if len(at):
                rows += 1
                same = torch.equal(got[at[0, 0]].view(torch.uint8), alone[i].view(torch.uint8))
                wrong[height] = wrong.get(height, 0) + (not same)
    error = ""
    if mixture.activation is MoEActivation.SILU:
        want = mixture.exact(chosen[:8])
        error = f", error {((alone[:8].double() - want).norm() / want.norm()).item():.2e}"
    return (
        f"{sum(wrong.values())}/{rows} differ, first at {next((h for h, n in wrong.items() if n), None)} tokens{error}"
    )


def microseconds(mixture: Mixture) -> str:
    times = {}
    for tokens in TIMED:
        x, ids, weights = mixture.x[:tokens], mixture.ids[:tokens], mixture.weights[:tokens]
        times[tokens] = 1e3 * triton.testing.do_bench_cudagraph(
            lambda x=x, i=ids, w=weights: mixture.call(x, i, w), rep=20
        )
    return ", ".join(f"{tokens}: {t:.0f}" for tokens, t in times.items())


def experts() -> None:
    for name, sizes in SIZES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if dtype != torch.bfloat16 and name not in ("odd", "Qwen3-30B-A3B"):
                continue
            mixture = Mixture(sizes, dtype)
            print(f"{name}, {dtype}: vLLM {differ(mixture)}", flush=True)
            timed = dtype == torch.bfloat16 and name != "odd"
            if timed:
                print(f"  us vLLM {microseconds(mixture)}", flush=True)
            with cuda_experts.experts_pinned():
                began = time.perf_counter()
                its_name = mixture.module.quant_config.config_name(dtype)
                cuda_experts.compare_layer(mixture.layer, mixture.k, its_name, 8192)
                print(f"  comparing took {time.perf_counter() - began:.1f} s", flush=True)
                print(f"  pinned: {differ(mixture)}", flush=True)
                if timed:
                    print(f"  us pinned {microseconds(mixture)}", flush=True)
                print(f"  {len([*cuda_experts._same.values()][-1])} tiles have the reference's bits", flush=True)
            del mixture
            torch.cuda.empty_cache()


def _routed(kind: str, logits: Tensor, k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if kind == "grouped":
        return ops.grouped_topk(logits, 8, 4, k, True, 2.5, bias, 1)  # type: ignore[no-any-return]
    tokens = logits.shape[0]
    weights = torch.empty(tokens, k, device="cuda")
    ids, places = (torch.empty(tokens, k, dtype=torch.int32, device="cuda") for _ in range(2))
    getattr(ops, f"topk_{kind}")(weights, ids, places, logits, True, bias)
    return weights, ids


def routers() -> None:
    for kind in ("softmax", "sigmoid", "grouped"):
        for n in (8, 16, 32, 60, 64, 128, 160, 256, 384, 512):
            for dtype in (torch.bfloat16, torch.float32):
                if kind == "grouped" and (n % 8 or n < 64):
                    continue
                for biased in (False, True):
                    if kind == "grouped" and not biased:
                        continue
                    _router(kind, n, dtype, biased)


def _router(kind: str, n: int, dtype: torch.dtype, biased: bool) -> None:
    k = min(8, n // 2)
    logits = torch.randn(1000, n, device="cuda").to(dtype)
    logits[::3] = logits[::3].mul(2).round().div(2)  # many equal ones
    logits[7] = 0
    bias = torch.randn(n, device="cuda").mul_(0.1) if biased else None
    case = f"{kind}, {n} experts, {dtype}{', bias' if biased else ''}"
    try:
        weights, ids = _routed(kind, logits, k, bias)
    except Exception as error:
        print(f"router {case}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return
    wrong = 0
    for size in (1, 2, 5, 16, 33, 128, 500):
        for start in range(0, 1000 - size, 97):
            w, i = _routed(kind, logits[start : start + size].contiguous(), k, bias)
            same = (w.view(torch.int32) == weights[start : start + size].view(torch.int32)) & (
                i == ids[start : start + size]
            )
            wrong += int((~same).any(-1).sum())
    line = f"router {case}: {wrong} differ from the same in other batches"
    if not biased:
        want = torch.sort(logits.float(), dim=-1, descending=True, stable=True)[1][:, :k]
        line += f"; {int((want != ids).any(-1).sum())} of 1000 not lowest index first"
    print(line, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), flush=True)
    torch.manual_seed(0)
    with torch.inference_mode(), contextlib.ExitStack():
        if "experts" not in sys.argv:
            routers()
        if "routers" not in sys.argv:
            experts()
