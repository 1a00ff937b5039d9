"""A compiler pass that makes LLM inference batch-invariant: the same bits whether a request runs alone or among others.

torch.compile(model, backend="bi_ascend")
LLM(model, compilation_config={"custom_passes": ["bi_ascend"]})
with bi_compile.invariant(): ...        # code that is not compiled
"""

from importlib.metadata import PackageNotFoundError, version

from .eager import install, invariant
from .errors import AuditError, BiCompileError, HostError, OptionError, RewriteError, TableError
from .options import Options
from .pipeline import Pipeline
from .table import Group, Pass, replaces

try:
    __version__ = version("bi-compile")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AuditError", "BiCompileError", "Group", "HostError", "OptionError", "Options", "Pass", "Pipeline", "RewriteError",
    "TableError", "install", "invariant", "replaces",
]  # fmt: skip
