"""Ascend's attention operator, replaced, on the emulated NPU: what it launches and which kernel served. One JSON line.

    python tests/ascend/attention_of_a_step.py [FOLDER_OF_A_PACKAGE]

For 1, 16 and 256 requests (decode, prefill, mixed; in pages and packed), the launches of a call by name: the native operator's,
ours in the first layer of a step, and in the others; with the folder of a
package `batch_invariant_ops` (`tests/helpers/stand_in`), that package's operators are there.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.extend(sys.argv[1:])
import emulated_npu
import torch
import torch_npu

from bi_compile import invariant, ops
from bi_compile.options import Options

HEADS, KV_HEADS, HEAD, BLOCK = 2, 1, 16, 128
REQUESTS = (1, 16, 256)
#: phase -> (tokens, keys) of request i
PHASES = {
    "decode": lambda i: (1, 1 + i % 7),
    "prefill": lambda i: (2 + i % 3, 2 + i % 3),
    "decode, then prefill": lambda i: (1, 5) if i < 8 else (3, 4),
}  # fmt: skip


def arguments(requests: list[tuple[int, int]], pages: bool) -> dict[str, Any]:
    tokens, keys = ([r[i] for r in requests] for i in (0, 1))
    shape = (len(requests), BLOCK, KV_HEADS * HEAD) if pages else (sum(keys), KV_HEADS, HEAD)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(s, generator=generator, dtype=torch.float16).npu()
        for s in ((sum(tokens), HEADS, HEAD), shape, shape)
    )
    table = torch.arange(len(requests), dtype=torch.int32).flip(0)[:, None].npu() if pages else None
    return {
        "query": query, "key": key, "value": value, "block_table": table, "input_layout": "TND", "sparse_mode": 3,
        "actual_seq_lengths": list(itertools.accumulate(tokens)), "num_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "actual_seq_lengths_kv": keys if pages else list(itertools.accumulate(keys)), "scale": 0.25, "block_size": BLOCK,
        "atten_mask": torch.ones(1, dtype=torch.bool).npu(),
    }  # fmt: skip


def launched(call: dict[str, Any]) -> tuple[dict[str, int], torch.Tensor]:
    before = emulated_npu.LAUNCHES.copy()
    out, _ = torch_npu.npu_fused_infer_attention_score(**call)
    return dict(emulated_npu.LAUNCHES - before), out.cpu()


def main() -> None:
    emulated_npu.install(perturb=False)
    found: dict[str, Any] = {"launches": {}, "error": 0.0}
    for phase, pages, n in itertools.product(PHASES, (True, False), REQUESTS):
        call = arguments([PHASES[phase](i) for i in range(n)], pages)
        native = launched(call)
        with invariant(Options(target="ascend-a2"), "npu"):
            launched(arguments([(1, 99)], True))  # another step before it
            ours, again = launched(call), launched(call)
        found["error"] = max(found["error"], *((y[1] - native[1]).abs().max().item() for y in (ours, again)))
        found["launches"][f"{phase}, {'pages' if pages else 'packed'}, {n}"] = native[0], ours[0], again[0]
    from bi_compile.kernels.ascend import ascendc
    from bi_compile.pipeline import Pipeline

    found["serves"] = ascendc.serves()
    with invariant(Options(target="ascend-a2"), "npu"):
        a, b = torch.ones(2, 4, 8, dtype=torch.float16).npu(), torch.ones(2, 8, 16, dtype=torch.float16).npu()
        y, _ = torch.bmm(a, b), torch.mm(a[0], b[0])
        found["transposed"] = torch.equal(ops.bmm_transposed(a, b).cpu(), y.cpu().transpose(0, 1))
        # theirs has the last dimension alone
        found["reductions"] = [
            torch.allclose(y.cpu().float(), want, atol=1e-3)
            for y, want in (
                (a.sum(-1), torch.full((2, 4), 8.0)), (a.sum([2], keepdim=True), torch.full((2, 4, 1), 8.0)),
                (a.sum(0), torch.full((4, 8), 2.0)), (a.sum([0, 1]), torch.full((8,), 8.0)), (a.mean(-1), torch.ones(2, 4)),
                (a.mean(1), torch.ones(2, 8)), (a.log_softmax(-1), torch.full((2, 4, 8), 1 / 8).log()),
            )
        ]  # fmt: skip
        call = arguments([(1, 3), (1, 7)], True)
        out = [torch.empty_like(call["query"]), torch.empty(1).npu()]
        torch_npu.npu_fused_infer_attention_score.out(**call, workspace=None, out=out)
        found["out"] = torch.equal(out[0].cpu(), torch_npu.npu_fused_infer_attention_score(**call)[0].cpu())
    theirs = sys.modules.get("batch_invariant_ops")
    found["calls"] = dict(theirs.CALLS) if theirs else {}
    found["certificate"] = dict(Pipeline(Options(target="ascend-a2")).knowledge("ascend-a2").target.native())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
