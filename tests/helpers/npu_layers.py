"""A decoder layer as vllm-ascend builds it, traced on fake npu:0 tensors, and what vllm-ascend's two compilers execute of it.

Everything is real but the device: CANN is a stand-in (bi_compile.offline.cann_stub), so nothing computes.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._guards
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "dense": Qwen3Config(**SMALL, architectures=["Qwen3ForCausalLM"]),
    "moe": Qwen3MoeConfig(
        **SMALL, architectures=["Qwen3MoeForCausalLM"], num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def model_folder(kind: str, folder: Path) -> str:
    CONFIGS[kind].save_pretrained(folder)
    return str(folder)


def engine_config(model: str, mode: str | None = None, **kwargs: Any) -> Any:
    """A VllmConfig with our pass; mode is the graph mode, None leaves it to the plugin."""
    from vllm.engine.arg_utils import EngineArgs

    compilation = {"custom_passes": ["bi_ascend"], **({} if mode is None else {"cudagraph_mode": mode})}
    compilation.update(kwargs.pop("compilation_config", {}))
    return EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=256,
        dtype="float16",
        compilation_config=compilation,
        **kwargs,
    ).create_engine_config()


@contextlib.contextmanager
def one_rank(config: Any) -> Iterator[None]:
    """vLLM's process groups for one rank, over gloo: HCCL is a stand-in."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.forward_context import set_forward_context

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with set_current_vllm_config(config):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1, backend="gloo")
        try:
            with set_forward_context(None, config):
                yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def trace_layer(config: Any, kind: str) -> tuple[fx.GraphModule, list[Any], FakeTensorMode]:
    """The second decoder layer of the model (it has a residual) as a graph over a symbolic number of rows."""
    import vllm_ascend.utils as utils
    from vllm.model_executor.models import qwen3, qwen3_moe
    from vllm_ascend.ascend_config import get_ascend_config

    # as its model runner does before it builds a model
    utils.register_ascend_customop(config)
    utils.set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    hf = config.model_config.hf_config
    torch.set_default_dtype(torch.float16)
    try:
        with mode, torch.device("npu:0"), torch.no_grad():
            if kind == "dense":
                layer: torch.nn.Module = qwen3.Qwen3DecoderLayer(hf, config.cache_config, prefix="model.layers.1")
            else:
                layer = qwen3_moe.Qwen3MoeDecoderLayer(config, prefix="model.layers.1")
            for module in layer.modules():
                method = getattr(module, "quant_method", None)
                if type(method).__name__ == "AscendUnquantizedLinearMethod":
                    method.process_weights_after_loading(module)
    finally:
        torch.set_default_dtype(torch.float32)
    layer.requires_grad_(False)
    weights = dict(layer.named_parameters()) | dict(layer.named_buffers())

    def run(positions: Any, hidden: Any, residual: Any, weights: Any) -> Any:
        return torch.func.functional_call(layer, weights, (positions, hidden, residual))

    with mode:
        hidden = torch.empty(_symbol(mode, 8), hf.hidden_size, dtype=torch.float16, device="npu:0")
        residual, positions = torch.empty_like(hidden), torch.empty(hidden.shape[0], dtype=torch.int64, device="npu:0")
        args = [positions, hidden, residual, weights]
        with torch.no_grad():
            graph = make_fx(run)(*args)
    return graph, torch.utils._pytree.tree_leaves(args), mode


def _symbol(mode: FakeTensorMode, hint: int) -> Any:
    from torch._dynamo.source import ConstantSource

    env = mode.shape_env
    assert env is not None
    source = ConstantSource("rows")
    return env.create_symintnode(env.create_symbol(hint, source, DimDynamic.DYNAMIC), hint=hint, source=source)


def manager_mode(config: Any, graph: fx.GraphModule, args: list[Any], mode: FakeTensorMode) -> fx.Graph:
    """The graph that vllm-ascend's GraphFusionPassManager leaves, with its own passes and ours last (as VllmBackend adds it)."""
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass
    from vllm.config.utils import Range
    from vllm_ascend.compilation.compiler_interface import fusion_pass_compile
    from vllm_ascend.compilation.graph_fusion_pass_manager import GraphFusionPassManager
    from vllm_ascend.utils import COMPILATION_PASS_KEY

    left: list[fx.Graph] = []

    class Look(VllmInductorPass):
        def __call__(self, graph: Any) -> None:
            left.append(getattr(graph, "graph", graph))

    manager = GraphFusionPassManager()
    with FakeTensorMode():  # its patterns are made on device tensors
        manager.configure(config)
    ours = config.compilation_config.inductor_compile_config.get(COMPILATION_PASS_KEY)
    if ours is not None:
        manager.add(ours)
    manager.add(Look(config))
    with torch.no_grad(), pass_context(Range(1, 8)), torch._guards.tracing(torch._guards.TracingContext(mode)):
        fusion_pass_compile(graph, args, {COMPILATION_PASS_KEY: manager}, Range(1, 8))
    return left[-1]


def npugraph_ex_mode(
    config: Any, graph: fx.GraphModule, args: list[Any], mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> fx.Graph:
    """The graph that npugraph_ex executes: after its patterns, our pass, and its last passes."""
    import torch_npu.dynamo  # noqa: F401  makes npugraph_ex importable
    from vllm.config.utils import Range
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.compilation.compiler_interface import npugraph_ex_compile

    left: list[fx.Graph] = []
    import npugraph_ex.npu_fx_compiler as compiler

    plain = compiler._NpuFxCompiler._gen_compiled_gm

    def look(self: Any, *inputs: Any) -> Any:
        executed = plain(self, *inputs)
        left.append(executed.fx_graph.graph)
        return executed

    monkeypatch.setattr(compiler._NpuFxCompiler, "_gen_compiled_gm", look)
    with torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(mode)):
        npugraph_ex_compile(graph, args, {}, config, get_ascend_config().ascend_compilation_config, Range(1, 8))
    return left[-1]


def operators(graph: fx.Graph) -> Counter[str]:
    return Counter(str(n.target) for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload))


def objections(graph: fx.Graph) -> list[str]:
    """What the audit says about a graph that no pass has been over."""
    from bi_compile import Options, Pipeline
    from bi_compile.audit.report import audit

    pipeline = Pipeline(Options(target="ascend-a2"))
    return sorted({f.operator for f in audit(graph, pipeline.knowledge("ascend-a2")).objections})
