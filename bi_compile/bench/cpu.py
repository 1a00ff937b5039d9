"""On a CPU: products against PyTorch's, vLLM end to end, passes and audit against the whole compilation."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path

import torch

from .measured import Benchmark, Measured, geometric_mean, interleaved


def product() -> Measured:
    """x[M, K] @ w[N, K]^T: bi_compile::mm against torch.mm."""
    from .. import ops

    ops.load_kernels("cpu")
    table = Measured(
        f"Product on the CPU, {torch.get_num_threads()} threads",
        ("dtype", "K = N", "M", "torch ms", "bi_compile ms", "ratio", "torch varies"),
    )
    ratios = []
    for dtype, k in itertools.product((torch.float32, torch.bfloat16), (1024, 4096)):
        torch.manual_seed(0)
        w = torch.randn(k, k).to(dtype).t()
        first = torch.randn(256, k).to(dtype)
        alone = {"torch": torch.mm(first[:1], w), "ours": ops.mm(first[:1], w)}
        for m in (1, 4, 16, 64, 256):
            x = first[:m].contiguous()
            assert torch.equal(ops.mm(x, w)[:1], alone["ours"]), "bi_compile::mm varies"
            varies = not torch.equal(torch.mm(x, w)[:1], alone["torch"])
            theirs, ours = interleaved([lambda x=x, w=w: torch.mm(x, w), lambda x=x, w=w: ops.mm(x, w)])  # type: ignore[misc]
            ratios.append(theirs / ours)
            table.add_row(
                str(dtype)[6:],
                str(k),
                str(m),
                f"{theirs * 1e3:.3f}",
                f"{ours * 1e3:.3f}",
                f"{theirs / ours:.2f}",
                "yes" if varies else "no",
            )
    table.line = f"geometric mean of the ratios {geometric_mean(ratios):.2f}"
    return table


def engine() -> Measured:
    """vLLM tokens per second with the pass against without, engines taking turns."""
    from ..measure.models import make
    from ..measure.process import take_turns

    table = Measured(
        "vLLM on the CPU, Qwen3-shaped, end to end",
        ("dtype", "requests", "without, tok/s", "with, tok/s", "ratio", "differ without", "differ with"),
    )
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        model = make("qwen3", Path(folder) / "qwen3")
        for dtype in ("float32", "bfloat16"):
            plan = {"model": str(model), "dtype": dtype, "batches": [1, 4, 16], "rounds": 7, "tokens": 16}
            without, ours = take_turns(
                "bi_compile.measure.requests",
                [{**plan, "compilation_config": c} for c in ({}, {"custom_passes": ["bi_ascend"]})],
            )
            for size in ("1", "4", "16"):
                a, b = without["batches"][size], ours["batches"][size]
                ratios.append(b["tokens_per_second"] / a["tokens_per_second"])
                table.add_row(
                    dtype,
                    size,
                    f"{a['tokens_per_second']:.0f}",
                    f"{b['tokens_per_second']:.0f}",
                    f"{ratios[-1]:.2f}",
                    str(a["logprobs"]),
                    str(b["logprobs"]),
                )
    table.line = f"geometric mean of the ratios {geometric_mean(ratios):.2f}"
    return table


def compilation() -> Measured:
    """The time of passes and audit against the whole compilation, and over the number of layers."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from ..backend import compile_graph
    from ..options import Options
    from ..pipeline import Pipeline

    table = Measured(
        "Compilation, Qwen3-shaped, Inductor, cold caches",
        ("layers", "nodes", "compilation s", "passes and audit s", "share", "audit s", "share", "audit ms a node"),
    )
    for layers in (28, 112):
        config = Qwen3Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=128, max_position_embeddings=128, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        pipeline = Pipeline(Options())
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=lambda gm, inputs, p=pipeline: compile_graph(p, gm, inputs))
        with tempfile.TemporaryDirectory() as cache, torch.no_grad():
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            start = time.perf_counter()
            compiled(torch.zeros(2, 8, dtype=torch.int64))
            whole = time.perf_counter() - start
        s = pipeline.summary
        table.add_row(
            str(layers),
            str(s.nodes),
            f"{whole:.1f}",
            f"{s.seconds:.2f}",
            f"{s.seconds / whole:.1%}",
            f"{s.audit_seconds:.2f}",
            f"{s.audit_seconds / whole:.1%}",
            f"{s.audit_seconds / s.nodes * 1e3:.3f}",
        )
    return table


BENCHES: dict[str, Benchmark] = {"product": product, "engine": engine, "compile": compilation}
#: benchmark -> the modules that it needs beside this package's own requirements
NEEDS: dict[str, tuple[str, ...]] = {"engine": ("vllm", "transformers"), "compile": ("transformers",)}
