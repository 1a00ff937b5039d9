"""vllm-ascend: its settings before it reads them, the pass in both of its compilers, and its own batch-invariant mode.

vllm-ascend 0.23 compiles in two ways, and which one follows the graph mode. With PIECEWISE its `GraphFusionPassManager` calls
each pass with the graph, ours last. With a FULL mode npugraph_ex (torchair where that is not there) compiles; its pattern
passes put fused norms back, and ours comes after them as `post_grad_custom_post_pass`. What npugraph_ex does to the graph
after that is audited once more, on the graph that is executed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import fx
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass
from vllm.logger import init_logger

from .. import eager_audit
from ..errors import HostError
from ..options import Options
from ..targets import ascend
from .ascend_attention import (
    captured_attention,
    check_config,
    check_graph_mode,
    check_layers,
    one_latent_form,
    pages_of_the_cache,
)
from .inductor import VllmPass
from .platforms import Platform, Switch
from .shared import attribute

log = init_logger("vllm.plugins.bi_compile")


class AscendPass(VllmPass, VllmInductorPass):
    """The passes and the audit as vllm-ascend's pass manager and npugraph_ex want them.

    Replacements are spliced in as they are: neither compiler decomposes operators.
    """

    def __init__(self, options: Options, theirs: Any = None) -> None:
        VllmPass.__init__(self, options, theirs)
        self.pass_name = type(self).__name__

    def __call__(self, graph: fx.Graph | fx.GraphModule) -> None:
        inner = graph.graph if isinstance(graph, fx.GraphModule) else graph
        if self.theirs is not None:
            # an operator that theirs would fuse is still whole here
            self.pipeline.rewrite(inner, "post_grad")
            self.theirs(graph)
        self.pipeline.rewrite(inner, "final")
        self.pipeline.audit(inner)


def before_config(vllm_config: Any) -> None:
    """Put vllm-ascend's settings into `additional_config`, before its platform reads them.

    Raises:
        HostError: a setting or variable says something else, or the NPU's software is not usable; the message has the remedy.
    """
    ascend.of_this_machine()
    ascend.check_kernels()
    check_config(vllm_config.model_config)
    if vllm_config.additional_config is None:
        vllm_config.additional_config = {}
    additional = vllm_config.additional_config
    _check_parallel(vllm_config)
    _settle(additional, ascend.ADDITIONAL, "additional_config")
    nested = additional.setdefault("ascend_compilation_config", {})
    _settle(nested, ascend.COMPILATION, 'additional_config["ascend_compilation_config"]')
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None:
        from vllm.config import CUDAGraphMode

        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    check_graph_mode(compilation.cudagraph_mode)


def _check_parallel(vllm_config: Any) -> None:
    """Ranks that share experts or a sequence are refused here, not at the first batch that they share."""
    parallel = vllm_config.parallel_config
    if parallel.enable_expert_parallel and parallel.world_size * parallel.data_parallel_size > 1:
        raise HostError(
            "enable_expert_parallel=True sends each token to the ranks of its experts and adds up what comes back in an order that nothing "
            "is known about (npu_moe_distribute_dispatch, npu_moe_distribute_combine): write enable_expert_parallel=False, which cuts every "
            "expert over the tensor-parallel ranks"
        )
    if getattr(vllm_config.compilation_config.pass_config, "enable_sp", None):
        raise HostError(
            "pass_config sets enable_sp=True: sequence parallelism fuses products and sums over ranks, which are unproven: write "
            "enable_sp=False there or remove the line"
        )
    for variable, key in ascend.VARIABLES.items():
        if os.environ.get(variable, "0") != "0":
            raise HostError(
                f"{variable}={os.environ[variable]} is set, and {ascend.ADDITIONAL[key][1]}: set it to 0 or unset it"
            )


def _settle(settings: MutableMapping[str, Any], needed: dict[str, tuple[object, str]], where: str) -> None:
    for name, (value, why) in needed.items():
        if settings.setdefault(name, value) != value:
            raise HostError(
                f"{where} sets {name}={settings[name]!r}, and {why}: write {name}={value!r} there or remove the line"
            )


def configure_backend(
    plain: Callable[..., None], config: Any, compilation: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Around `vllm_ascend.compilation.compiler_interface._configure_backend`, which makes npugraph_ex's `CompilerConfig`."""
    from vllm.platforms import current_platform

    plain(config, compilation, vllm_config, *args, **kwargs)
    ours = vllm_config.compilation_config.inductor_compile_config[current_platform.pass_key]
    into_compiler(config, ours)


def into_compiler(config: Any, ours: AscendPass) -> None:
    """Put `ours` last into a `CompilerConfig` of npugraph_ex or torchair, and audit what it executes."""
    theirs = config.post_grad_custom_post_pass.value

    def bi_compile_post_pass(gm: fx.GraphModule, example_inputs: Any = None, config: Any = None) -> None:
        if theirs is not None:
            theirs(gm, example_inputs, config)
        ours(gm)
        gm.recompile()

    bi_compile_post_pass.ours = ours  # type: ignore[attr-defined]
    config.post_grad_custom_post_pass = bi_compile_post_pass
    _audit_what_is_executed(type(config).__module__.partition(".configs")[0])


@functools.cache
def _audit_what_is_executed(compiler: str) -> None:
    """After the last pass of the compiler ("npugraph_ex", "torchair") its graph is audited, if it has our pass."""
    cls = importlib.import_module(f"{compiler}._acl_concrete_graph.fx2acl_converter").AclConcreteGraph
    plain = cls.optimize_graph_without_runtime

    @functools.wraps(plain)
    def optimize_graph_without_runtime(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        ours = getattr(self.config.post_grad_custom_post_pass.value, "ours", None)
        if ours is not None:
            ours.pipeline.audit(self.fx_graph.graph)
        return result

    cls.optimize_graph_without_runtime = optimize_graph_without_runtime


# -- what is switched in a worker -------------------------------------------------------------------------------------


def load_custom_ops(vllm_config: Any) -> None:
    """Register vllm-ascend's own fused operators (`_C_ascend`) where a mixture of experts needs them: on A2 and A3.

    Raises:
        HostError: the model is one, and the operators are not installed.
    """
    import vllm_ascend.utils as utils

    if vllm_config.model_config.is_moe and utils.get_ascend_device_type() != utils.AscendDeviceType.A5:
        utils.bootstrap_custom_op_env()
        try:
            import vllm_ascend.vllm_ascend_C
            import vllm_ascend.meta_registration  # noqa: F401  # isort: skip
        except ImportError as error:
            raise HostError(
                f"a mixture of experts needs vllm-ascend's own operators here, and they cannot be loaded ({error}): install a vllm-ascend that "
                "was built with COMPILE_CUSTOM_KERNELS=1"
            ) from error


def variant_custom_ops_off() -> Switch:
    """vllm-ascend uses its own fused operators only where it cannot do without, as in its batch-invariant mode; the table replaces those."""
    import vllm_ascend.utils as utils

    return attribute(utils, "_CUSTOM_OP_ENABLED", False)


@contextlib.contextmanager
def atb_warm_up_not_judged() -> Iterator[None]:
    """`_npu_matmul_add_fp32`, by which vllm-ascend loads the ATB library with numbers that it makes up, is no part of the model's work."""
    from vllm_ascend.worker.worker import NPUWorker

    plain = NPUWorker._warm_up_atb

    @functools.wraps(plain)
    def warm_up_atb(self: Any) -> None:
        with eager_audit.inside():
            plain(self)

    with attribute(NPUWorker, "_warm_up_atb", warm_up_atb):
        yield


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch.use_deterministic_algorithms(True): some operators of an Ascend 950 are deterministic only if asked for."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def own_mode_off() -> Iterator[None]:
    """VLLM_BATCH_INVARIANT=1: vllm-ascend keeps its settings, and leaves the operators to us, so that none is patched twice."""
    import vllm_ascend.batch_invariant as own

    if own._batch_invariant_LIB is not None:
        raise HostError(
            "vllm-ascend's own batch-invariant mode has patched operators in this process already: start the engine in a fresh process, "
            "or unset VLLM_BATCH_INVARIANT"
        )
    with attribute(own, "enable_batch_invariant_mode", lambda: None):
        yield


PLATFORM = Platform(
    device="npu",
    environment=ascend.ENVIRONMENT,
    before_config=before_config,
    prepare=load_custom_ops,
    switches=(
        variant_custom_ops_off,
        atb_warm_up_not_judged,
        deterministic_algorithms,
        own_mode_off,
        one_latent_form,
        captured_attention,
        pages_of_the_cache,
    ),
    check_model=check_layers,
    make_pass=AscendPass,
    own_operators_in_table=True,
)
