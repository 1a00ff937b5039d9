"""What the configuration of an engine with `custom_passes` gets: the pass, and the settings that the guarantee needs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from packaging.version import Version
from vllm.logger import init_logger

from ..errors import HostError
from ..options import Options, read_options
from ..resolve import resolve_passes
from ..targets import for_device, get_target
from . import platforms
from .inductor import VllmPass
from .keys import KEY, NEWEST, OLDEST, OPTIONS

log = init_logger("vllm.plugins.bi_compile")


def check_names(names: Sequence[str]) -> None:
    """Raise OptionError for an unknown pass, HostError for a vLLM that is not supported."""
    import vllm

    version = Version(vllm.__version__.split("+")[0])
    if version.release < OLDEST.release:
        raise HostError(
            f"bi_compile's {KEY} needs vLLM {OLDEST} or newer, this is {version}: upgrade vLLM or remove the key"
        )
    if version.release >= NEWEST.release:
        log.warning("bi_compile: vLLM %s is newer than what bi_compile was tried with (before %s)", version, NEWEST)
    resolve_passes(names)


def options_of(vllm_config: Any) -> Options:
    """The options of an engine: `custom_passes` and `additional_config["bi_compile"]`.

    Raises:
        OptionError: an unknown pass or option.
    """
    given = (vllm_config.additional_config or {}).get(OPTIONS)
    return read_options(
        given, passes=tuple(getattr(vllm_config.compilation_config, KEY)), inner="inductor", target=_target()
    )


def _target() -> str:
    return for_device(platforms.current().device, compiled=True).name


def before_config(vllm_config: Any) -> None:
    """What has to be settled before the platform reads the configuration; called before a VllmConfig is made.

    Raises:
        HostError: what is wrong, and what to write instead.
    """
    platform = platforms.current()
    for name, (value, why) in platform.environment.items():
        if os.environ.get(name, value).lower() != value:
            raise HostError(f"{name}={os.environ[name]} is set, and {why}: set {name}={value} or unset it")
    platform.before_config(vllm_config)


def configure(vllm_config: Any) -> None:
    """Put the pass into the compilation config; called when a VllmConfig is made.

    Raises:
        OptionError, HostError: what is wrong, and what to write instead.
    """
    from vllm.platforms import current_platform

    options, platform = options_of(vllm_config), platforms.current()
    if vllm_config.lora_config is not None:
        raise HostError(f"{KEY} does not cover LoRA's kernels: serve the merged model, or remove {KEY}")
    _check_sizes(vllm_config)
    if options.tp_invariant is not None:
        _check_ranks(vllm_config, platform, options.tp_invariant)
    _check_mode(vllm_config, platform)
    # without a compiler vLLM calls fused kernels of its own, about which nothing is known; its plain PyTorch code is in the table
    custom_ops = vllm_config.compilation_config.custom_ops
    if "all" in custom_ops and not platform.own_operators_in_table:
        custom_ops[custom_ops.index("all")] = "none"
    _plain_ir(vllm_config, platform)
    # a norm arrives as one operator, not as what its implementation is made of
    if vllm_config.compilation_config.backend == "inductor":
        vllm_config.compilation_config.ir_enable_torch_wrap = True
    config = vllm_config.compilation_config.inductor_compile_config
    for name, needed in get_target(_target()).inductor.items():
        if config.setdefault(name, needed) != needed:
            raise HostError(
                f"inductor_compile_config sets {name}={config[name]!r}, but the guarantee needs {needed!r}: remove that line"
            )
    key = current_platform.pass_key
    if not isinstance(config.get(key), VllmPass):
        config[key] = platform.make_pass(options, config.get(key))


def _check_mode(vllm_config: Any, platform: platforms.Platform) -> None:
    """Refuse what was not tried, and a compiler that runs no pass over its graphs."""
    from vllm.config import CompilationMode

    compilation, executor = vllm_config.compilation_config, vllm_config.parallel_config.distributed_executor_backend
    if executor == "ray":
        raise HostError(
            'distributed_executor_backend="ray" was not tried: its workers run the model past the methods that bi_compile hooks; write '
            '"mp", or start one engine on each machine'
        )
    if compilation.mode == CompilationMode.NONE:
        return  # everything runs uncompiled and is judged there
    if platform.make_pass is VllmPass and compilation.backend != "inductor":
        raise HostError(
            f"compilation_config sets backend={compilation.backend!r}, which runs no pass over its graphs, so nothing in them can be "
            "replaced or judged: remove that line, or write enforce_eager=True"
        )
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise HostError(
            "TORCHDYNAMO_DISABLE=1 is set, so nothing is compiled although the configuration says so: unset it, or write enforce_eager=True"
        )


def _check_sizes(vllm_config: Any) -> None:
    """Refuse ranks that do not divide what each of them has a part of: a worker of vLLM's would end with an assertion that has no words."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    if model is None:
        return
    found = model.hf_text_config
    # where there are both, the second is that of layers without experts, which a model need not have
    for name in ("moe_intermediate_size", "intermediate_size"):
        size = getattr(found, name, None)
        if isinstance(size, int) and size % ranks:
            raise HostError(
                f"tensor_parallel_size={ranks} does not divide {name}={size}, of which each rank has a part: write a number of ranks that does"
            )
        if size is not None:
            return


def _check_ranks(vllm_config: Any, platform: platforms.Platform, segments: int) -> None:
    """Refuse `tp_invariant` where it was not tried, and a number of ranks that does not divide it."""
    if not platform.divides_invariantly:
        raise HostError(f"tp_invariant={segments} was not tried on vLLM's platform {platform.device!r}: leave it out")
    try:
        from . import ranks  # noqa: F401
    except ImportError as error:
        raise HostError(f"tp_invariant does not fit this vLLM ({error}): leave it out, or use vLLM 0.32") from error
    size = vllm_config.parallel_config.tensor_parallel_size
    if segments % size:
        raise HostError(
            f"tensor_parallel_size={size} does not divide tp_invariant={segments}: write tp_invariant as the largest number of ranks that is "
            "to have the same bits, and powers of two for both"
        )


def _plain_ir(vllm_config: Any, platform: platforms.Platform) -> None:
    """vLLM's IR runs its PyTorch code (on CUDA without a compiler it would run kernels of its own)."""
    priority = getattr(vllm_config.kernel_config, "ir_op_priority", None)
    if priority is None or platform.own_operators_in_table:
        return
    for field in dataclasses.fields(priority):
        setattr(priority, field.name, ["native"])


def nested_compilation(vllm_config: Any) -> dict[str, Any]:
    """Inductor's settings for what vLLM compiles beside the model in a worker of this engine."""
    from torch._inductor import config
    from vllm.platforms import current_platform

    ours = vllm_config.compilation_config.inductor_compile_config[current_platform.pass_key]
    theirs = config.post_grad_custom_post_pass
    return {**get_target(_target()).inductor, "post_grad_custom_post_pass": ours.nested(theirs)}
