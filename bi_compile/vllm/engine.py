"""What an engine with `custom_passes` gets: the pass, the settings that the guarantee needs, kernels, eager fallback, a report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from packaging.version import Version

from .. import eager
from ..errors import HostError
from ..options import Options, read_options, resolve_passes
from .hooks import KEY

log = logging.getLogger("bi_compile")

OPTIONS = "bi_compile"
"""The key of `additional_config` that holds the options."""
OLDEST, NEWEST = Version("0.23"), Version("0.34")
#: the settings that each platform needs: environment variable -> value, and why
ENVIRONMENT: dict[str, dict[str, tuple[str, str]]] = {
    "cpu": {"VLLM_CPU_ATTN_SPLIT_KV": ("0", "attention splits the keys by how many requests there are")},
    "cuda": {},
}
_fallback: eager.EagerFallback | None = None


def check_names(names: Sequence[str]) -> None:
    """Raise OptionError for an unknown pass, HostError for a vLLM that is not supported."""
    import vllm

    version = Version(vllm.__version__.split("+")[0])
    if version.release < OLDEST.release:
        raise HostError(f"bi_compile's {KEY} needs vLLM {OLDEST} or newer, this is {version}: upgrade vLLM or remove the key")
    if version.release >= NEWEST.release:
        log.warning("bi_compile: vLLM %s is newer than what bi_compile was tried with (before %s)", version, NEWEST)
    resolve_passes(names)


def options_of(vllm_config: Any) -> Options:
    """The options of an engine: `custom_passes` and `additional_config["bi_compile"]`.

    Raises:
        OptionError: an unknown pass or option.
    """
    given = (vllm_config.additional_config or {}).get(OPTIONS)
    target = _platform()
    return read_options(given, passes=tuple(getattr(vllm_config.compilation_config, KEY)), inner="inductor", target=target)


def _platform() -> str:
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device not in ENVIRONMENT:
        raise HostError(f"bi_compile has no target for vLLM's platform {device!r}: it has {', '.join(ENVIRONMENT)}; remove {KEY} from the compilation config")
    return device


def configure(vllm_config: Any) -> None:
    """Put the pass into the compilation config and set what the guarantee needs; called when a VllmConfig is made.

    Raises:
        OptionError, HostError: what is wrong, and what to write instead.
    """
    from vllm.platforms import current_platform

    from .inductor import PostGradPass

    options = options_of(vllm_config)
    for name, (value, why) in ENVIRONMENT[_platform()].items():
        if os.environ.get(name, value) != value:
            raise HostError(f"{name}={os.environ[name]} is set, and {why}: set {name}={value} or unset it")
        os.environ[name] = value
    if getattr(vllm_config.compilation_config, "mode", None) and vllm_config.lora_config is not None:
        raise HostError(f"{KEY} does not cover LoRA's kernels: serve the merged model, or remove {KEY}")
    config = vllm_config.compilation_config.inductor_compile_config
    key = current_platform.pass_key
    if not isinstance(config.get(key), PostGradPass):
        config[key] = PostGradPass(options, config.get(key))


def prepare_worker(vllm_config: Any) -> None:
    """Load the kernels and install the eager fallback in a worker process, before the model is loaded."""
    global _fallback
    options = options_of(vllm_config)
    device = _platform()
    if _fallback is not None:
        _fallback.remove()
    _fallback = eager.install(options, device)
    for switch in WORKER.get(device, ()):
        switch()


def _plain_linear() -> None:
    """Keep linear layers as torch.nn.functional.linear with their weight: vLLM packs it for oneDNN, which varies by M."""
    from vllm.model_executor.layers import utils

    packed: Callable[..., None] = utils.dispatch_cpu_unquantized_gemm
    if getattr(packed, "_bi_compile", False):
        return

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim != 2:
            packed(layer, remove_weight)
        else:
            layer.cpu_linear = torch.nn.functional.linear

    dispatch_cpu_unquantized_gemm._bi_compile = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


#: what is switched in a worker process of each platform
WORKER: dict[str, tuple[Callable[[], None], ...]] = {"cpu": (_plain_linear,)}


def report(vllm_config: Any) -> None:
    """One log line for the engine."""
    from vllm.platforms import current_platform

    found = vllm_config.compilation_config.inductor_compile_config.get(current_platform.pass_key)
    summary = getattr(getattr(found, "pipeline", None), "summary", None)
    if summary is None or not summary.graphs:
        compiled = "no graph was compiled here: eager mode, or graphs from the cache of an earlier start with the same passes and settings"
    else:
        compiled = summary.line()
    log.warning("bi_compile: %s; %d operators replaced in eager code", compiled, len(_fallback.operators) if _fallback else 0)
