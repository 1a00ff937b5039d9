"""What is known of vLLM without importing it: the versions that are served, the key of the compilation config, and the key of
`additional_config` that holds the options."""

from __future__ import annotations

from packaging.version import Version

KEY = "custom_passes"
OPTIONS = "bi_compile"
OLDEST, NEWEST = Version("0.23"), Version("0.34")
"""The oldest version that is served, and the first that was not tried."""
