"""The same bits on 1, 2, 4, ... tensor-parallel ranks: the option `tp_invariant`.

With tp_invariant = S the sum over a dimension K that vLLM divides over ranks has one order for every number T of them that divides S:
K is cut into S equal segments, each is summed by itself, and the segments' sums are joined in float32 in a tree of adjacent pairs.
Rank r of T has the segments r S/T up to (r + 1) S/T, which are a subtree, and `ops.all_reduce_tree` joins the ranks' subtrees. The
result, and then a bias, is rounded once. Rank 1 of 1 does the same without a collective, so its bits are those.

    RowParallelLinear        ops.mm_segments, ops.all_reduce_tree, + bias in float32
    mixtures of experts      `ops.moe_experts` for each segment of the experts' intermediate size; its results, which it rounds to the
                             model's dtype, are the leaves of the tree
    VocabParallelEmbedding   one rank's row, its bytes added to zeros as integers, so that -0.0 stays

What vLLM divides by heads, columns or rows of the vocabulary has sums of its own for each, which no rank changes. Any other sum over ranks is
refused (the pass `InOneTree`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm._custom_ops import cpu_fused_moe
from vllm.distributed import get_tp_group
from vllm.distributed.utils import split_tensor_along_last_dim
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from .. import ops
from ..errors import HostError
from .shared import attribute

# -- what the layers compute ------------------------------------------------------------------------------------------


def over_ranks(total: Tensor, group: str | None) -> Tensor:
    """A rank's subtree -> the whole tree. group: torch.distributed's name of the ranks' group; None: there is one rank."""
    return total if group is None else ops.all_reduce_tree(total, group)


@functools.cache
def _row_parallel(cls: Any) -> type:
    class RowParallel(cls):
        """A RowParallelLinear; `bi_segments`: how many of the segments this rank has."""

        __slots__ = ()

        def forward(self, input_: Tensor) -> Any:
            if not self.input_is_parallel:
                input_ = split_tensor_along_last_dim(input_, num_partitions=self.tp_size)[self.tp_rank].contiguous()
            x = input_.reshape(-1, input_.shape[-1])
            y = over_ranks(ops.mm_segments(x, self.weight.t(), self.bi_segments), self.bi_group)
            if self.bias is not None and not self.skip_bias_add:
                y = y + self.bias
            output = y.to(input_.dtype).view(*input_.shape[:-1], y.shape[-1])
            return (output, self.bias if self.skip_bias_add else None) if self.return_bias else output

    return RowParallel


@functools.cache
def _vocab_parallel(cls: Any) -> type:
    class VocabParallel(cls):
        """A VocabParallelEmbedding, which leaves the sum over ranks to this."""

        __slots__ = ()

        def forward(self, input_: Tensor) -> Tensor:
            own: Tensor = super().forward(input_)
            return ops.all_reduce(own.view(torch.int8), "sum", self.bi_group).view(own.dtype)

    return VocabParallel


@functools.cache
def _mixture(cls: Any) -> type:
    class Mixture(cls):
        """A MoERunner whose experts, and whose shared experts, finish their sums."""

        __slots__ = ()

        @property
        def _fused_output_is_reduced(self) -> bool:
            return True

        def _maybe_reduce_shared_expert_output(self, shared_output: Any, *_: Any) -> Any:
            return shared_output

    return Mixture


@functools.cache
def _experts(cls: Any) -> type:
    class Experts(cls):
        """CPUUnquantizedExperts; its weights are all experts' first segments, then their second ones, ..."""

        __slots__ = ()

        def apply(
            self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
            activation: Any, apply_router_weight_on_input: bool, **_: Any,
        ) -> None:  # fmt: skip
            n, parts = self.bi_segments, []
            weights = (w1, w2, self.w1_bias, self.w2_bias)
            for own in zip(*([None] * n if w is None else w.chunk(n) for w in weights), strict=True):
                part = torch.empty_like(output)
                rest = (activation.value, self.isa, apply_router_weight_on_input)
                cpu_fused_moe(part, hidden_states, *own, topk_weights, topk_ids, *rest)
                parts.append(part)
            output.copy_(over_ranks(ops.in_pairs(torch.stack(parts).float()), self.bi_group))

    return Experts


# -- putting it into a model ------------------------------------------------------------------------------------------


def _become(layer: Any, kind: Any, segments: int) -> None:
    ranks = get_tp_group().world_size
    layer.bi_segments, layer.bi_group = segments // ranks, get_tp_group().device_group.group_name if ranks > 1 else None
    layer.__class__ = kind(type(layer))


def put_in(model: nn.Module, segments: int) -> None:
    """Have the layers of a loaded model add up in one order.

    Raises:
        HostError: a layer whose sum cannot be taken so; the message names it.
    """
    layers = dict(model.named_modules())
    finished: set[int] = set()
    for name, layer in layers.items():
        if isinstance(layer, MoERunner):
            _check_mixture(name, layer)
            _become(layer, _mixture, segments)
            finished.update(id(m) for m in layer.modules())
    for name, layer in layers.items():
        if isinstance(layer, RowParallelLinear) and not layer.disable_tp:
            _check_linear(name, layer, segments, id(layer) in finished)
            _become(layer, _row_parallel, segments)
        elif isinstance(layer, VocabParallelEmbedding) and layer.tp_size > 1 and getattr(layer, "reduce_results", True):
            layer.reduce_results = False
            _become(layer, _vocab_parallel, segments)


def _check_linear(name: str, layer: Any, segments: int, finished: bool) -> None:
    if type(layer.quant_method) is not UnquantizedLinearMethod or layer.weight.dim() != 2:
        raise HostError(
            f"{name}: tp_invariant takes linear layers that are not quantised, this one has {type(layer.quant_method).__name__}: leave "
            "tp_invariant out, or serve the model in bfloat16 or float16"
        )
    if not layer.reduce_results and not finished:
        raise HostError(
            f"{name} leaves its sum over ranks to the model, which adds up what is rounded already: leave tp_invariant out for this model"
        )
    _check_size(name, layer.input_size, segments)


def _check_size(name: str, size: int, segments: int) -> None:
    if size % segments:
        raise HostError(
            f"{name} adds up {size} products, which do not divide into tp_invariant={segments} segments: write a smaller power of two, or "
            "leave tp_invariant out for this model"
        )


def _check_mixture(name: str, layer: Any) -> None:
    kernel = getattr(layer._quant_method, "moe_kernel", None)
    if not hasattr(getattr(kernel, "fused_experts", None), "bi_segments"):
        raise HostError(
            f"{name}: tp_invariant takes experts that are not quantised, in vLLM's CPU kernel, these have "
            f"{type(getattr(kernel, 'fused_experts', layer._quant_method)).__name__}: leave tp_invariant out for this model"
        )
    if layer.moe_config.skip_final_all_reduce:
        raise HostError(
            f"{name} leaves its sum over ranks to the model, which adds up what is rounded already: leave tp_invariant out for this model"
        )


@contextlib.contextmanager
def experts_in_segments(segments: int) -> Iterator[None]:
    """Mixtures of experts that are loaded in the block keep their weights in segments."""
    plain = CPUUnquantizedExperts.process_weights_after_loading

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        _divide(self, layer, segments)
        with attribute(self, "moe_config", _of_a_segment(self.moe_config, segments)):
            plain(self, layer)
        if self._use_zentorch:
            raise HostError(
                f"{layer.layer_name}: tp_invariant was not tried with zentorch's experts: uninstall zentorch, or leave tp_invariant out"
            )

    with attribute(CPUUnquantizedExperts, "process_weights_after_loading", process_weights_after_loading):
        yield


def _of_a_segment(config: Any, segments: int) -> Any:
    found = copy.copy(config)
    found.intermediate_size_per_partition = config.intermediate_size // segments
    return found


def _divide(experts: Any, layer: Any, segments: int) -> None:
    """Put the segments of this rank's part of the intermediate size one behind the other in the dimension of the experts."""
    config, ranks = experts.moe_config, get_tp_group().world_size
    _check_size(layer.layer_name, config.intermediate_size, segments)
    if config.intermediate_size_per_partition * ranks != config.intermediate_size:
        raise HostError(
            f"{layer.layer_name}: its experts are divided over more than the {ranks} tensor-parallel ranks: leave tp_invariant out"
        )
    fits, why = experts._supports_grouped_gemm(_of_a_segment(config, segments))
    if not fits:
        raise HostError(
            f"{layer.layer_name}: a segment of {config.intermediate_size // segments} does not fit vLLM's kernel ({why}): write a smaller "
            "tp_invariant, or leave it out for this model"
        )
    own = segments // ranks
    # the rows of its gate and up alternate, the others' lie apart
    halves = 1 if config.activation == MoEActivation.SWIGLUOAI else 2

    def rows(x: Tensor) -> Tensor:
        # [E, halves * own * n, ...] -> [own * E, halves * n, ...]
        return x.unflatten(1, (halves, own, -1)).permute(2, 0, 1, 3, *range(4, x.dim() + 2)).flatten(0, 1).flatten(1, 2)

    layer.w13_weight.data = rows(layer.w13_weight.data).contiguous()
    layer.w2_weight.data = layer.w2_weight.data.unflatten(2, (own, -1)).permute(2, 0, 1, 3).flatten(0, 1).contiguous()
    if hasattr(layer, "w13_bias"):
        layer.w13_bias.data = rows(layer.w13_bias.data).contiguous()
    if hasattr(layer, "w2_bias"):  # the first segment's; of several ranks the first has it
        bias = layer.w2_bias.data
        layer.w2_bias.data = torch.cat([bias, bias.new_zeros((own - 1) * bias.shape[0], bias.shape[1])])
    _become(experts, _experts, segments)
