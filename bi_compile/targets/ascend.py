"""Ascend NPUs: Atlas A2 (Ascend 910B), A3 (910_93xx) and Ascend 950, with vllm-ascend's compiler, npugraph_ex or none.

Nothing here was run on hardware. Each entry names where it is known from: vllm-ascend's batch-invariant mode (PR 6910 and
batch_invariant.py, which its users run on A2 and A3), CANN's documentation, or the operator's meaning.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys

import torch

from ..errors import HostError
from ..kernels.ascend.ascendc import ascendc_operators, serves
from .target import Device, Target
from .torch_npu_ops import ROW_LOCAL, TRUSTED, UNPROVEN

#: operators of vllm-ascend 0.23 that are opaque in its graphs
_HOST = {
    "vllm::unified_attention_with_output": "its kernel, npu_fused_infer_attention_score, is called in eager code, where the table "
    "replaces it: each query by itself, or AscendC's in a call for prefill and one for decode",
    "vllm::mla_forward": "latent attention, called in eager code, where the table replaces its norm, products and attention operator; all "
    "tokens take one form (bi_compile/vllm/ascend_attention.py)",
    "vllm::unified_kv_cache_update": "copies keys and values into their slots",
    "vllm::maybe_chunk_residual": "takes this rank's rows (vllm_ascend/ops/register_custom_ops.py)",
    "vllm::all_gather": "joins the ranks' parts, adds nothing up",
    "vllm::maybe_all_gather_and_maybe_unpad": "joins the ranks' rows (vllm_ascend/ops/register_custom_ops.py)",
    "vllm::muls_add": "x * scale + y, pointwise (vllm_ascend/ops/triton/muls_add.py)",
    "vllm::quantize": "each element by itself (npu_quantize)",
    "vllm::npu_rotary_embedding": "each row is rotated by its own angle (vllm_ascend/ops/rotary_embedding.py)",
    "vllm::maybe_all_reduce_tensor_model_parallel": "sums over ranks in HCCL, whose order HCCL_DETERMINISTIC=strict keeps (it is set)",
    "vllm::maybe_pad_and_reduce": "sums over ranks in HCCL, whose order HCCL_DETERMINISTIC=strict keeps (it is set)",
    "_C_ascend::npu_dequant_swiglu_quant": "int32 sums are scaled and activated each by itself, and each row is quantised by its own "
    "largest element (csrc/moe of vllm-ascend 0.23)",
    "vllm::prefetch_preprocess": "moves weights into the cache",
    "vllm::prefetch_postprocess": "waits for a stream",
    "vllm::moe_forward_shared": "as vllm::moe_forward, and the shared experts' products, which run in eager code too",
    "vllm::moe_forward": "its kernels are called in eager code, where the table replaces them: products of each expert "
    "(npu_grouped_matmul), gating, and the sum over a token's experts (npu_moe_token_unpermute)",
}
#: pointwise by their definition, though PyTorch does not tag them so
_ATEN = {"aten::polar": "abs * cos(angle) and abs * sin(angle), each element by itself (torch.polar's documentation)"}
_HOST_UNPROVEN = {
    "vllm::qkv_rmsnorm_rope": "norm and rotation in one Triton kernel: set ascend_compilation_config.fuse_qknorm_rope=False",
    "vllm::matmul_and_reduce": "a product and a sum over ranks in one: switch sequence parallelism off (VLLM_ASCEND_ENABLE_FLASHCOMM1=0)",
    "_C_ascend::matmul_allreduce_add_rmsnorm": "set ascend_compilation_config.fuse_allreduce_rms=False",
}

ENVIRONMENT = {
    "HCCL_DETERMINISTIC": (
        "strict",
        "collectives otherwise choose the order of their sum; strict keeps it (CANN 8.5 documentation; on A2 only where every "
        "server has the same number of devices), true only promises the same bits from run to run",
    ),
    "LCCL_DETERMINISTIC": ("1", "the low-latency collectives otherwise choose the order of their sum"),
}
#: keys of vllm-ascend's additional_config: value, and why
ADDITIONAL: dict[str, tuple[object, str]] = {
    "weight_nz_mode": (0, "a product with a weight in the NZ format takes another kernel (vllm-ascend PR 6910)"),
    "enable_matmul_allreduce": (False, "the fused product and all-reduce is cut by the number of rows (vllm-ascend PR 6910)"),
    "enable_fused_mc2": (0, "dispatch, experts' products and combine in one kernel, which nothing is known about"),
    "enable_mlapo": (False, "norms, products and rotation in one kernel, which nothing is known about"),
    "enable_flashcomm1": (False, "sequence parallelism fuses products and sums over ranks (vllm.matmul_and_reduce), which are unproven"),
    "enable_flashcomm2_parallel_size": (0, "it sends o_proj's rows through all-to-all and products of other sizes, which are unproven"),
}  # fmt: skip
#: vllm-ascend's older variables for keys of additional_config, which the key would silently outdo
VARIABLES = {
    "VLLM_ASCEND_ENABLE_FLASHCOMM1": "enable_flashcomm1",
    "VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE": "enable_flashcomm2_parallel_size",
}
#: keys of additional_config["ascend_compilation_config"]: value, and why
COMPILATION: dict[str, tuple[object, str]] = {
    "fuse_allreduce_rms": (False, "it fuses products, all-reduce and norm into a kernel that nothing is known about"),
    "fuse_qknorm_rope": (False, "it fuses norms and rotation into a kernel that nothing is known about"),
    "enable_static_kernel": (False, "it compiles a kernel for each batch size"),
}


def _target(name: str) -> Target:
    return Target(
        name=name,
        device="npu",
        row_local={**ROW_LOCAL, **_ATEN},
        trusted={**TRUSTED, **_HOST},
        unproven={**UNPROVEN, **_HOST_UNPROVEN},
        native=serves,
    )


A2, A3, A950 = _target("ascend-a2"), _target("ascend-a3"), _target("ascend-950")

#: names that ACL gives chips -> target; None: refused
CHIPS: tuple[tuple[str, Target | None], ...] = (
    (r"Ascend910_93\w*", A3),
    (r"Ascend910B[\w-]*", A2),
    (r"Ascend950\w*", A950),
    (r"Ascend310P\w*", None),
)


def of_chip(chip: str) -> Target:
    """The target of the chip that ACL calls `chip` ("Ascend910B2", "Ascend910_9391", "Ascend950PR_9599").

    Raises:
        HostError: a 310P, or a chip that is not known.
    """
    for pattern, target in CHIPS:
        if re.fullmatch(pattern, chip, re.IGNORECASE):
            if target is None:
                raise HostError(
                    f"{chip} is not supported: its vector unit has no bfloat16 and CANN has no invariant operators for it; use an "
                    "Atlas A2, A3 or Ascend 950"
                )
            return target
    raise HostError(
        f"unknown chip {chip!r}: known are Ascend910B* (ascend-a2), Ascend910_93* (ascend-a3) and Ascend950* (ascend-950); if yours "
        'is one of them under another name, say so with the option target="ascend-a2"'
    )


def of_this_machine() -> Target:
    """The target of this machine's NPU.

    Raises:
        HostError: torch_npu or CANN is missing, they do not fit, or the chip is not supported.
    """
    check_torch_npu()
    return of_chip(torch.get_device_module("npu").get_device_name(0))


def _here(compiled: bool) -> Target:
    return of_this_machine()


#: torch_npu registers its device as PrivateUse1
DEVICE = Device("npu", "PrivateUse1", "bi_compile.kernels.ascend", (A2, A3, A950), _here)


def check_torch_npu() -> None:
    """Raise HostError unless torch_npu is there, for this torch, with CANN's libraries."""
    if importlib.util.find_spec("torch_npu") is None:
        raise HostError("torch_npu is not installed: pip install torch-npu of the release that torch has")
    check_versions(importlib.metadata.version("torch"), importlib.metadata.version("torch_npu"))
    try:
        import torch_npu  # noqa: F401
    except ImportError as error:
        raise HostError(
            f"torch_npu cannot load CANN ({error}): install CANN and run `source /usr/local/Ascend/ascend-toolkit/set_env.sh`"
        ) from error


def check_versions(of_torch: str, of_torch_npu: str) -> None:
    """Raise HostError unless both are of one release (2.13.0+cpu and 2.13.0.post2 are)."""
    ours, theirs = (".".join(re.split(r"[+.]", v)[:3]) for v in (of_torch, of_torch_npu))
    if ours != theirs:
        raise HostError(
            f"torch {of_torch} and torch_npu {of_torch_npu} are of different releases: pip install torch-npu=={ours}, or torch=={theirs}"
        )


def check_kernels() -> None:
    """Raise HostError if there are neither AscendC operators nor Triton for Ascend."""
    ascendc_operators()
    if importlib.util.find_spec("triton") is None:
        raise HostError(
            "there are no kernels for this NPU: pip install triton-ascend (the AscendC package batch_invariant_ops alone has no "
            "norms, no softmax and no addmm)"
        )


def is_capturing() -> bool:
    """Whether an ACL graph is being captured: numbers that are read on the host would stay in it for ever."""
    if "torch_npu" not in sys.modules:
        return False
    return bool(torch.get_device_module("npu").is_current_stream_capturing())
