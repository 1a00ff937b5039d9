"""`bi-compile audit --target ascend-a2 MODEL_DIR`: what the passes would do to a model on Ascend, on a machine without an NPU.

The model of transformers is built from its config.json without weights, on fake `npu:0` tensors, and traced over a symbolic
batch. Where CANN is not installed, stand-ins let torch_npu be imported; nothing is computed, with them or without.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ..audit.report import Finding, audit
from ..errors import HostError, OptionError
from ..options import Options
from ..pipeline import Pipeline
from ..targets.ascend import check_torch_npu, check_versions
from .cann_stub import LIBRARIES, folder

#: target -> the chip that the stand-ins say they are
CHIPS = {"ascend-a2": "Ascend910B2", "ascend-a3": "Ascend910_9391", "ascend-950": "Ascend950PR_9599"}
#: a batch that equals no other size of a model, which PyTorch would take for the same
BATCH = 1009
LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Offline:
    """What `run` found."""

    model: str
    target: str
    nodes: int
    varies: dict[str, int]
    """Operators that the audit objects to before the passes, with their number."""
    replaced: dict[str, int]
    trusted: dict[str, str]
    left: tuple[Finding, ...]
    """What the audit objects to after the passes."""


def load_torch_npu(target: str, say: Callable[[str], None]) -> None:
    """Import torch_npu, on stand-ins where CANN is not on the library path; `say` gets the line that says so.

    Raises:
        HostError: torch_npu is not installed, is of another release than torch, or the stand-ins cannot be built.
    """
    if "torch_npu" not in sys.modules:
        try:
            ctypes.CDLL("libascendcl.so")
        except OSError:
            os.environ["BI_COMPILE_STAND_IN_SOC"] = CHIPS[target]
            where = folder()
            say(f"CANN is not here: torch_npu runs on stand-ins that compute nothing ({where})")
            for name in LIBRARIES:
                # torch_npu's own references find a library that is loaded already by its name
                ctypes.CDLL(str(where / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    check_torch_npu()


def run(model: Path, target: str, say: Callable[[str], None], dump_dir: Path | None = None) -> Offline:
    """Trace the model in the folder `model`, and judge it before and after the passes.

    dump_dir: a folder to write the graph into, as the option of that name does.

    Raises:
        OptionError: the target is none of Ascend's, or the folder holds no model that transformers knows.
        HostError: as `load_torch_npu` does.
    """
    if target not in CHIPS:
        raise OptionError(f"the target {target!r} cannot be audited offline: known are {', '.join(CHIPS)}")
    if not (model / "config.json").is_file():
        raise OptionError(f"{str(model)!r} holds no config.json: name the folder of a model of transformers")
    if importlib.util.find_spec("torch_npu") is None:
        raise HostError("torch_npu is not installed: pip install torch-npu of the release that torch has")
    check_versions(importlib.metadata.version("torch"), importlib.metadata.version("torch_npu"))
    load_torch_npu(target, say)
    graph = trace(model)
    pipeline = Pipeline(Options(target=target, dump_dir=None if dump_dir is None else str(dump_dir)))
    known = pipeline.knowledge(target)
    before = audit(graph.graph, known)
    pipeline.rewrite(graph.graph, "captured")
    after = audit(graph.graph, known)
    pipeline.certify(after, known)
    return Offline(
        model=str(model),
        target=target,
        nodes=len(after.findings),
        varies=dict(Counter(f.operator for f in before.objections)),
        replaced=dict(pipeline.summary.replaced),
        trusted={f.operator: f.reason for f in after.findings if f.verdict.value == "trusted"},
        left=after.objections,
    )


class _Attention(TorchFunctionMode):
    """torch_npu's own way from scaled_dot_product_attention to its operator is in C++ and fixes the batch; this keeps it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attention = func is torch.nn.functional.scaled_dot_product_attention
        return (_attention if attention else func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise HostError(
            f"the model's attention adds a mask of {attn_mask.dtype} to its scores, which this audit does not follow: give it a mask of truth values"
        )
    mask = None if attn_mask is None else attn_mask.logical_not()
    if is_causal:
        mask = query.new_ones(2048, 2048, dtype=torch.bool).triu(1)
    return torch.ops.npu.npu_fusion_attention_v3(
        query, key, value, query.shape[1], "BNSD", None, None, mask, query.shape[-1] ** -0.5 if scale is None else scale, 1.0 - dropout_p,
        sparse_mode=2 if is_causal else 0,
    )[0]  # fmt: skip


def trace(model: Path) -> fx.GraphModule:
    """The forward pass over token numbers [batch, 16], batch symbolic, in bfloat16."""
    import transformers
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    try:
        config = transformers.AutoConfig.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError) as error:
        raise OptionError(f"transformers cannot read the model in {str(model)!r}: {error}") from error
    causal = any("CausalLM" in name for name in config.architectures or ())
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    shapes = ShapeEnv()
    mode, source = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True), ConstantSource("batch")
    batch = shapes.create_symintnode(shapes.create_symbol(BATCH, source, DimDynamic.DYNAMIC), hint=BATCH, source=source)
    with mode, torch.device("npu:0"), torch.no_grad(), _Attention():
        network = auto.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
        inputs = torch.empty(batch, LENGTH, dtype=torch.int64), torch.ones(batch, LENGTH, dtype=torch.int64)
        state = {**dict(network.named_parameters()), **dict(network.named_buffers())}

        def forward(tokens: torch.Tensor, mask: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
            given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "return_dict": False}
            return torch.func.functional_call(network, state, (), given | ({"use_cache": False} if causal else {}))[0]

        graph = make_fx(forward, record_stack_traces=True)(*inputs, state)
    placeholders = (n for n in graph.graph.nodes if n.op == "placeholder")
    for node, name in zip(placeholders, ("input_ids", "attention_mask", *state), strict=True):
        node.meta["bi_compile_input"] = name
    if shapes.replacements:
        raise HostError(
            f"the model in {str(model)!r} cannot be traced over a symbolic batch: it fixes it to {dict(shapes.replacements)}"
        )
    return graph
