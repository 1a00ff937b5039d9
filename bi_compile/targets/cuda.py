"""CUDA devices, with Inductor's Triton as the compiler."""

from . import Target

TARGET = Target(
    name="cuda",
    device="cuda",
    trusted={"vllm.unified_kv_cache_update.default": "copies keys and values into their slots"},
)
