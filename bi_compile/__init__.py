"""A compiler pass that makes LLM inference batch-invariant: the same bits whether a request runs alone or among others.

torch.compile(model, backend="bi_ascend")
LLM(model, compilation_config={"custom_passes": ["bi_ascend"]})
with bi_compile.invariant(): ...        # code that is not compiled
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .eager import install
from .eager_audit import invariant
from .errors import AuditError, BiCompileError, HostError, MeasureError, OptionError, RewriteError, TableError
from .options import Options
from .pipeline import Pipeline
from .table import Pass, Pattern, refuse, replaces

if TYPE_CHECKING:
    from .backend import compile
    from .measure.verify import verify

try:
    __version__ = version("bi-compile")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AuditError", "BiCompileError", "HostError", "MeasureError", "OptionError", "Options", "Pass", "Pattern", "Pipeline",
    "RewriteError", "TableError", "compile", "install", "invariant", "refuse", "replaces", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # what is needed to measure and to compile is imported when it is used
    if name == "compile":
        from .backend import compile

        return compile
    if name == "verify":
        from .measure.verify import verify

        return verify
    if name == "Group":
        raise ImportError(
            "bi_compile.Group is called Pattern now, and a pass lists them as `patterns`: write that instead"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
