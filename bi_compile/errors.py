"""What can go wrong, as sentences that name the thing, the place and the remedy."""

import difflib
from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str:
    """What someone who wrote `name` may have meant, to be put behind it in a sentence; nothing where none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class BiCompileError(Exception):
    """Base of everything that bi_compile raises on purpose."""


class OptionError(BiCompileError, ValueError):
    """An option that cannot be read: an unknown pass, a malformed value, an unknown key."""


class TableError(BiCompileError):
    """A table that cannot be used: two passes replace one operator, or a replacement does not fit its operator."""


class RewriteError(BiCompileError):
    """A node that cannot be rewritten: its shape is unknown, or its replacement gives something else than it did."""


class AuditError(BiCompileError):
    """A graph that is not batch-invariant, or of which that is not known."""


class HostError(BiCompileError):
    """The host program (vLLM, vllm-ascend) cannot be served: too old, or without a setting that the guarantee needs."""


class MeasureError(BiCompileError):
    """What cannot be measured: no batch dimension, inputs that share memory, a function that is not deterministic."""


class ProcessError(MeasureError):
    """A process of a measurement (an engine, a second Python) that ended without a result."""
