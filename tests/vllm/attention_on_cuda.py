"""vLLM's attention on a CUDA device of compute capability 9.0: each query alone and among others, as vLLM calls it, pinned, and by
bi_compile's kernel.

    python tests/vllm/attention_on_cuda.py                       # minutes
    python tests/vllm/attention_on_cuda.py bi_compile            # one of the kinds

Prints for heads, pages and windows how many queries differ in any bit from the same request alone, and the relative error of the
first against float64. Requests of 1 to 3,000 keys come in chunks of up to 40 queries, at any place, beside up to 17 others.
bi_compile/vllm/cuda_attention.py accepts what differs nowhere.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.ops.triton_unified_attention import unified_attention
from vllm.vllm_flash_attn import flash_attn_varlen_func

from bi_compile.vllm.cuda_attention import ours, pinned

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 300, 511, 640, 1025, 2049, 3000]
LAST = 40
"""Queries of each request that are compared."""
SEGMENTS = 16
HEADS = [(16, 8, 128), (32, 8, 128), (14, 2, 64), (8, 8, 64), (16, 8, 256), (12, 4, 96)]
Request = tuple[int, int, int]  # which, its first query, number of queries
rng = random.Random(0)


class Case:
    """Random keys and values in pages that lie anywhere, and queries, for requests of LENGTHS keys."""

    def __init__(self, heads: int, kv_heads: int, size: int, page: int, window: int) -> None:
        pages = [-(-n // page) for n in LENGTHS]
        self.size, self.window = size, window
        self.keys, self.values = torch.randn(
            2, sum(pages), page, kv_heads, size, device="cuda", dtype=torch.bfloat16
        ).unbind(0)
        places = torch.randperm(sum(pages), device="cuda", dtype=torch.int32)
        self.tables = places.split(pages)
        self.queries = [torch.randn(n, heads, size, device="cuda", dtype=torch.bfloat16) for n in LENGTHS]

    def attend(self, kind: str, requests: list[Request]) -> Tensor:
        """The output for the requests of one batch."""
        query = torch.cat([self.queries[i][first : first + n] for i, first, n in requests])
        starts = [0, *itertools.accumulate(n for _, _, n in requests)]
        lengths = [first + n for _, first, n in requests]
        table = torch.nn.utils.rnn.pad_sequence([self.tables[i] for i, _, _ in requests], batch_first=True)
        out = torch.full_like(query, float("nan"))
        plain = flash_attn_varlen_func if "Flash" in kind else unified_attention
        attention = pinned(plain) if "pinned" in kind else ours(plain) if kind == "bi_compile" else plain
        attention(
            q=query, k=self.keys, v=self.values, out=out, softmax_scale=self.size**-0.5, causal=True, block_table=table,
            cu_seqlens_q=torch.tensor(starts, device="cuda", dtype=torch.int32),
            seqused_k=torch.tensor(lengths, device="cuda", dtype=torch.int32),
            max_seqlen_q=max(n for _, _, n in requests), max_seqlen_k=max(lengths), softcap=0.0,
            **(self._flash(kind) if "Flash" in kind else self._triton(query)),
        )  # fmt: skip
        return out

    def _flash(self, kind: str) -> dict[str, Any]:
        window = [self.window - 1, 0] if self.window else [-1, -1]
        return {"window_size": window, "fa_version": 3, "num_splits": 1 if "one part" in kind else 0}

    def _triton(self, query: Tensor) -> dict[str, Any]:
        heads, width, kv_heads = query.shape[1], 1 << (self.size - 1).bit_length(), self.keys.shape[2]
        return {
            "window_size": (self.window - 1, 0) if self.window else (-1, -1),
            "q_descale": None, "k_descale": None, "v_descale": None,
            "seq_threshold_3D": 128 // kv_heads, "num_par_softmax_segments": SEGMENTS,
            "softmax_segm_output": torch.empty(512, heads, SEGMENTS, width, device="cuda"),
            "softmax_segm_max": torch.empty(512, heads, SEGMENTS, device="cuda"),
            "softmax_segm_expsum": torch.empty(512, heads, SEGMENTS, device="cuda"),
        }  # fmt: skip

    def exact(self, request: Request) -> Tensor:
        """In float64."""
        i, first, n = request
        group = self.queries[i].shape[1] // self.keys.shape[2]
        k, v = (
            x[self.tables[i]].flatten(0, 1)[: first + n].repeat_interleave(group, 1).double()
            for x in (self.keys, self.values)
        )
        scores = torch.einsum("lhd,shd->hls", self.queries[i][first : first + n].double(), k) * self.size**-0.5
        at, keys = torch.arange(first, first + n, device="cuda")[:, None], torch.arange(first + n, device="cuda")
        hidden = (keys > at) | ((keys <= at - self.window) if self.window else False)
        return torch.einsum("hls,shd->lhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def differ(case: Case, kind: str, batches: int = 60) -> str:
    """How many queries of random batches differ from the same alone."""
    last = [(i, n - min(n, LAST), min(n, LAST)) for i, n in enumerate(LENGTHS)]
    alone = [case.attend(kind, [request]) for request in last]
    error = max(
        ((a.double() - (e := case.exact(r))).norm() / e.norm()).item() for a, r in zip(alone, last, strict=True)
    )
    wrong = rows = 0
    for _ in range(batches):
        longest, requests = rng.choice([1, 1, 4, 10, LAST]), []
        for i in rng.sample(range(len(LENGTHS)), rng.choice([1, 2, 3, 7, 16, 18])):
            n = rng.randint(1, min(LENGTHS[i], longest))
            requests.append((i, rng.randint(last[i][1], LENGTHS[i] - n), n))
        parts = case.attend(kind, requests).split([n for _, _, n in requests])
        for (i, first, n), part in zip(requests, parts, strict=True):
            want = alone[i][first - last[i][1] :][:n]
            wrong += int((part.view(torch.int16) != want.view(torch.int16)).flatten(1).any(1).sum())
            rows += n
    return f"{kind} {wrong}/{rows} ({error:.1e})"


KINDS = ("FlashAttention", "FlashAttention one part", "FlashAttention pinned", "Triton", "Triton pinned", "bi_compile")


def main(kinds: Sequence[str]) -> None:
    for (heads, kv_heads, size), page, window in itertools.product(HEADS, (16, 128), (0, 100, 2501)):
        case = Case(heads, kv_heads, size, page, window)
        found = "; ".join(differ(case, kind) for kind in kinds)
        print(
            f"{heads}/{kv_heads} heads of {size}, pages of {page}, window {window or 'none'}: {found}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:] or KINDS)
