"""What an engine with `custom_passes` gets: the pass, the settings that the guarantee needs, kernels, eager fallback, a report."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from packaging.version import Version
from vllm.logger import init_logger

from .. import eager
from ..errors import HostError
from ..options import Options, read_options
from ..resolve import resolve_passes
from ..targets import for_device, get_target
from . import platforms
from .keys import KEY, NEWEST, OLDEST, OPTIONS

log = init_logger("vllm.plugins.bi_compile")

#: what `prepare_worker` changed in this process, and how to undo it
_prepared = contextlib.ExitStack()
_fallback: eager.EagerFallback | None = None


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

    from .inductor import VllmPass

    options, platform = options_of(vllm_config), platforms.current()
    if vllm_config.lora_config is not None:
        raise HostError(f"{KEY} does not cover LoRA's kernels: serve the merged model, or remove {KEY}")
    # without a compiler vLLM calls fused kernels of its own, of which nothing is known; its plain PyTorch code is in the table
    custom_ops = vllm_config.compilation_config.custom_ops
    if "all" in custom_ops and not platform.own_operators_in_table:
        custom_ops[custom_ops.index("all")] = "none"
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


def prepare_worker(vllm_config: Any) -> None:
    """Set what the guarantee needs in a worker process, before the model is loaded; `release` takes it back."""
    global _fallback
    release()
    options, platform = options_of(vllm_config), platforms.current()
    with contextlib.ExitStack() as stack:
        for name, (value, _) in platform.environment.items():
            stack.enter_context(_environment(name, value))
        if options.on_unproven == "warn":
            # a graph out of a cache is not judged again, so nobody would hear of what it holds
            stack.enter_context(_environment("VLLM_DISABLE_COMPILE_CACHE", "1"))
            stack.enter_context(torch.compiler.config.patch(force_disable_caches=True))
        for switch in platform.switches(vllm_config):
            stack.enter_context(switch)
        _fallback = stack.enter_context(eager.invariant(options, platform.device))
        _prepared.push(stack.pop_all())


@atexit.register  # at the very end, modules that it needs are gone
def release() -> None:
    """Undo what `prepare_worker` did in this process: after an error, or when another engine starts without the key."""
    global _fallback
    _fallback = None
    _prepared.close()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def check_model(vllm_config: Any) -> None:
    """What can only be checked once a worker's model is there.

    Raises:
        HostError: what is wrong, and what to write instead.
    """
    platforms.current().check_model(vllm_config)


def report(vllm_config: Any) -> None:
    """One log line for the engine."""
    from vllm.platforms import current_platform

    found = vllm_config.compilation_config.inductor_compile_config.get(current_platform.pass_key)
    summary = getattr(getattr(found, "pipeline", None), "summary", None)
    if summary is None or not summary.graphs:
        compiled = "no graph was compiled here: eager mode, or graphs from the cache of an earlier start with the same passes and settings"
    else:
        compiled = summary.line()
    say = log.warning if summary is not None and summary.left else log.info
    say("bi_compile: %s; %d operators replaced in eager code", compiled, len(_fallback.operators) if _fallback else 0)
