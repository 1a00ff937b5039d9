"""CUDA devices, with Inductor's Triton as the compiler."""

from . import ROUND_EVERY_OPERATOR, Target

TARGET = Target(
    name="cuda",
    device="cuda",
    inductor=ROUND_EVERY_OPERATOR,
    trusted={"vllm.unified_kv_cache_update.default": "copies keys and values into their slots"},
)
