"""The options of every face: what they are called, what they may hold, and how they are read."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import OptionError
from .table import Pass
from .targets import get_target

ALL = "bi_ascend"
"""The name that stands for every pass."""
ON_UNPROVEN = ("error", "warn")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a graph is made batch-invariant.

    Attributes:
        passes: the passes, in order: "bi_ascend" for all, a pass by name, or a user's "package.module:object".
        on_unproven: what to do where a node is not known to be invariant: "error" stops, "warn" says it once an operator.
        dump_dir: a folder for dumps, or None.
        target: "cpu", "cuda", "ascend-a2", "ascend-a3" or "ascend-950"; None: the device of the graph.
        inner: what compiles the rewritten graph: "inductor", or any other backend that torch._dynamo.list_backends names.
        trust: operators (`ns::name`) that the user declares invariant, each with a reason.
        probe: a file of `bi-compile probe`: an operator that was measured to vary is not trusted; None: nothing was measured.
        batch: input -> its batch dimension, for graphs of static shapes; None: the symbolic dimensions.
    """

    passes: tuple[str, ...] = (ALL,)
    on_unproven: str = "error"
    dump_dir: str | None = None
    target: str | None = None
    inner: str = "inductor"
    trust: Mapping[str, str] = dataclasses.field(default_factory=dict)
    batch: Mapping[str, int] | None = None
    probe: str | None = None

    def __post_init__(self) -> None:
        if self.on_unproven not in ON_UNPROVEN:
            raise OptionError(f"on_unproven={self.on_unproven!r}: it is {' or '.join(map(repr, ON_UNPROVEN))}")
        if self.target is not None:
            get_target(self.target)
        if not isinstance(self.trust, Mapping) or not all(
            isinstance(s, str) and s for item in self.trust.items() for s in item
        ):
            raise OptionError(
                f'trust={self.trust!r}: it maps an operator to the reason why it is invariant, as in {{"ns::op": "reason"}}'
            )
        if self.batch is not None and not (
            isinstance(self.batch, Mapping) and all(type(v) is int for v in self.batch.values())
        ):
            raise OptionError(
                f'batch={self.batch!r}: it maps an input of the graph to its batch dimension, as in {{"x": 0}}'
            )
        if self.probe is not None:
            _check_probe(self.probe)
        resolve_passes(self.passes)
        if self.inner != "inductor":
            _check_inner(self.inner)
        if self.dump_dir is not None:
            _check_writable(Path(self.dump_dir))


def read_options(given: Mapping[str, Any] | None, **fixed: Any) -> Options:
    """Options from a mapping, as `torch.compile(options=…)` or vLLM's `additional_config` hold them.

    Raises:
        OptionError: an unknown key, or a value that does not fit.
    """
    given = given or {}
    if not isinstance(given, Mapping):
        raise OptionError(f"the options of bi_compile are a mapping, got {given!r}")
    known = [f.name for f in dataclasses.fields(Options)]
    unknown = [k for k in given if k not in known or k in fixed]
    if unknown:
        raise OptionError(
            f"unknown option {', '.join(map(repr, unknown))}: bi_compile knows {', '.join(k for k in known if k not in fixed)}"
        )
    values = {**given, **fixed}
    if "passes" in values:
        values["passes"] = _names(values["passes"])
    for key, kind in (("dump_dir", "folder"), ("probe", "file")):
        if values.get(key) is not None:
            if not isinstance(values[key], (str, Path)):
                raise OptionError(f"{key}={values[key]!r}: it is the name of a {kind}")
            values[key] = str(values[key])
    for key in ("on_unproven", "inner"):
        if key in values and not isinstance(values[key], str):
            raise OptionError(f"{key}={values[key]!r}: it is a str")
    return Options(**values)


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise OptionError(f'passes={value!r}: it is a list of names, as in ["{ALL}"]')
    return tuple(value)


def pass_names() -> list[str]:
    """The names that `passes` and `custom_passes` understand."""
    from .passes import PASSES

    return [ALL, *(p.name for p in PASSES)]


def resolve_passes(names: Sequence[str]) -> list[type[Pass]]:
    """The passes called `names`, each once, in that order.

    Raises:
        OptionError: a name that is unknown or cannot be imported; the message lists those that are known.
    """
    from .passes import PASSES

    by_name = {p.name: p for p in PASSES}
    found: list[type[Pass]] = []
    for name in names:
        if name == ALL:
            found += PASSES
        elif name in by_name:
            found.append(by_name[name])
        elif ":" in name:
            found.append(_users_pass(name))
        else:
            raise OptionError(
                f'unknown pass {name!r}: known are {", ".join(pass_names())}, or "package.module:object" for one of yours'
            )
    return list(dict.fromkeys(found))


def _users_pass(name: str) -> type[Pass]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module does at import
        raise OptionError(
            f'the pass {name!r} cannot be imported ({error}): known are {", ".join(pass_names())}, or "package.module:object"'
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise OptionError(f"{name!r} is {found!r}, which is no subclass of bi_compile.Pass")
    return found


def _check_probe(path: str) -> None:
    from .measure import probe

    why = probe.stale(probe.read(path))
    if why is not None:
        raise OptionError(f"probe={path!r}: {why}")


def _check_inner(name: str) -> None:
    from torch._dynamo.backends.registry import list_backends

    known = list_backends(exclude_tags=())
    if name not in known:
        raise OptionError(
            f"inner={name!r}: known are {', '.join(['inductor', *(b for b in known if b != 'inductor')])}"
        )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a name of its own: several processes may look at once
    except OSError as error:
        raise OptionError(
            f"dump_dir={str(folder)!r} cannot be written ({error.strerror}): name a folder that can"
        ) from error
