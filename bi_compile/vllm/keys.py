"""What a user writes for vLLM: the key of the compilation config, and the key of `additional_config` that holds the options."""

from __future__ import annotations

KEY = "custom_passes"
OPTIONS = "bi_compile"
