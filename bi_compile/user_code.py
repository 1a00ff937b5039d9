"""Where in a user's program something happens."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from typing import Any

import torch
from torch import fx

#: what stands here is no place in a user's program
_OURS_AND_TORCHS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")

#: host programs, which hold layers and operators beside their models
_HOSTS = ("vllm", "vllm_ascend", "transformers")


def is_of_the_model(file: str) -> bool:
    """Whether a file is the user's, or defines a model of vLLM or transformers: neither PyTorch's, nor ours, nor what they run models with."""
    loaded = (sys.modules[name] for name in _HOSTS if name in sys.modules)
    hosts = tuple(folder + os.sep for module in loaded for folder in getattr(module, "__path__", ()))
    return not file.startswith(_OURS_AND_TORCHS) and not (file.startswith(hosts) and "/models/" not in file)


def place() -> str:
    """`file, line N, in function` of the innermost frame that is neither torch's nor ours nor generated."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS_AND_TORCHS + triton_files()):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"


@functools.cache
def triton_files() -> tuple[str, ...]:
    """The folder of Triton's package; nothing where it is not installed."""
    spec = importlib.util.find_spec("triton")
    return tuple(p + os.sep for p in (spec.submodule_search_locations or ())) if spec else ()


def inherited(node: fx.Node) -> dict[str, Any]:
    """What a node that stands in another's place has of its `meta`: whence it comes, and nothing of its value or its arguments."""
    of_the_value = ("val", "tensor_meta", "example_value", "eager_input_vals")
    return {k: v for k, v in node.meta.items() if k not in of_the_value}
