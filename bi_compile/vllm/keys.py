"""What is known of vLLM without importing it: the versions that are served, the key of the compilation config, the key of
`additional_config` that holds the options, and what its sampler calls."""

from __future__ import annotations

from packaging.version import Version

KEY = "custom_passes"
OPTIONS = "bi_compile"
OLDEST, NEWEST = Version("0.23"), Version("0.34")
"""The oldest version that is served, and the first that was not tried."""

RANDOM_SAMPLING = dict.fromkeys(
    [
        f"aten.{name}"
        for name in "exponential.default exponential_.default rand.default rand.generator rand_like.default randint.low "
        "randint.low_generator randint_like.low_dtype uniform_.default".split()
    ]
    + ["prims.inductor_random.default"],
    "vLLM draws random numbers for dummy requests and for sampling, where a request with a seed of its own draws the same in every batch "
    "(docs/use/vllm.md)",
)
"""Trusted in what vLLM runs beside the model's graph."""
