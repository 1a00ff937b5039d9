"""Mixtures of experts in a worker's model: where they stand, and what their routers are to choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import HostError


def check_data_parallel(vllm_config: Any) -> None:
    """Raise HostError where data-parallel ranks would share a mixture of experts; those of other models know nothing of each other."""
    model, size = vllm_config.model_config, vllm_config.parallel_config.data_parallel_size
    if size > 1 and model is not None and model.is_moe:
        raise HostError(
            f"data_parallel_size={size}: the ranks send each other tokens for a mixture of experts, which was not tried; remove that line, or "
            "start engines of their own"
        )


def mixtures(vllm_config: Any) -> Iterator[tuple[str, Any]]:
    """Name and layer of each mixture of experts in a worker's model; the layer has a `router`."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "router", None) is not None:
            yield name, layer


def wrong_routing(router: Any) -> str | None:
    """What is wrong with how many experts a router of vLLM's is to choose, and out of which groups; None: nothing."""
    experts, k = router.global_num_experts, router.top_k
    if not 0 < k <= experts:
        return f"a token is to have {k} of {experts} experts"
    # up to 0.23 or so only a router that has groups knows of them
    if not getattr(router, "use_grouped_topk", hasattr(router, "num_expert_group")):
        return None
    groups, chosen = router.num_expert_group, router.topk_group
    if not groups or experts % groups:
        return f"{experts} experts are to stand in {groups} groups of one size"
    if not chosen or chosen > groups:
        return f"{chosen} of {groups} groups are to be chosen"
    if k > chosen * (experts // groups):
        return f"{chosen} groups have {chosen * (experts // groups)} experts, of which a token is to have {k}"
    return None


def check_routing(vllm_config: Any) -> None:
    """Raise HostError where a router is to choose what is not there."""
    for name, layer in mixtures(vllm_config):
        wrong = wrong_routing(layer.router)
        if wrong:
            raise HostError(f"{name}: {wrong}: correct the model's config.json")
