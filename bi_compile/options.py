"""The options of every face: what they are called, what they may hold, and how they are read.

Values and nothing else: `bi_compile.resolve` finds what they name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import OptionError, meant

ALL = "bi_ascend"
"""The name that stands for every pass."""
ON_UNPROVEN = ("error", "warn")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a graph is made batch-invariant. Raises OptionError: a value of the wrong form.

    Attributes:
        passes: the passes, in order: "bi_ascend" for all, a pass by name, or a user's "package.module:object".
        on_unproven: what to do where a node is not known to be invariant: "error" stops, "warn" says it once an operator.
        dump_dir: a folder for dumps, or None.
        target: "cpu", "cuda", "ascend-a2", "ascend-a3" or "ascend-950"; None: the device of the graph.
        inner: what compiles the rewritten graph: "inductor", or any other backend that torch._dynamo.list_backends names.
        trust: operators (`ns::name`) that the user declares invariant, each with a reason.
        probe: a file of `bi-compile probe`: an operator that was measured to vary is not trusted; None: nothing was measured.
        tp_invariant: vLLM's engines: the same bits on any number of tensor-parallel ranks up to this one, powers of two; None: no.
        batch: input -> its batch dimension; None: dimension 0 of each input of the call (vLLM: the first symbolic one).
    """

    passes: tuple[str, ...] = (ALL,)
    on_unproven: str = "error"
    dump_dir: str | None = None
    target: str | None = None
    inner: str = "inductor"
    trust: Mapping[str, str] = dataclasses.field(default_factory=dict)
    batch: Mapping[str, int] | None = None
    probe: str | None = None
    tp_invariant: int | None = None

    def __post_init__(self) -> None:
        if self.on_unproven not in ON_UNPROVEN:
            raise OptionError(f"on_unproven={self.on_unproven!r}: it must be {' or '.join(map(repr, ON_UNPROVEN))}")
        if self.target is not None and not isinstance(self.target, str):
            raise OptionError(f"target={self.target!r}: it must be the name of a target, as a str")
        for key, kind in (("dump_dir", "folder"), ("probe", "file")):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value or "\0" in value):
                raise OptionError(f"{key}={value!r}: it must be the name of a {kind}")
        if not isinstance(self.trust, Mapping) or not all(
            isinstance(s, str) and s.strip() for item in self.trust.items() for s in item
        ):
            raise OptionError(
                f'trust={self.trust!r}: it must map an operator to the reason why it is invariant, as in {{"ns::op": "reason"}}'
            )
        most = self.tp_invariant
        if most is not None and (type(most) is not int or most < 2 or most & (most - 1)):
            raise OptionError(
                f"tp_invariant={most!r}: it must be the largest number of ranks, a power of two from 2 on"
            )
        if self.batch is not None and not (
            isinstance(self.batch, Mapping) and all(type(v) is int for v in self.batch.values())
        ):
            raise OptionError(
                f'batch={self.batch!r}: it must map an input of the graph to its batch dimension, as in {{"x": 0}}'
            )


def read_options(given: Mapping[str, Any] | None, **fixed: Any) -> Options:
    """Options from a mapping, as `torch.compile(options=…)` or vLLM's `additional_config` hold them.

    Raises:
        OptionError: an unknown key, or a value that does not fit.
    """
    given = given or {}
    if not isinstance(given, Mapping):
        raise OptionError(f"the options of bi_compile must be a mapping, got {given!r}")
    known = [f.name for f in dataclasses.fields(Options)]
    unknown = [k for k in given if k not in known or k in fixed]
    if unknown:
        free = [k for k in known if k not in fixed]
        raise OptionError(
            f"unknown option {', '.join(repr(k) + meant(str(k), free) for k in unknown)}: bi_compile knows {', '.join(free)}"
        )
    values = {**given, **fixed}
    if "passes" in values:
        values["passes"] = _names(values["passes"])
    for key, kind in (("dump_dir", "folder"), ("probe", "file")):
        if values.get(key) is not None:
            if not isinstance(values[key], (str, Path)):
                raise OptionError(f"{key}={values[key]!r}: it must be the name of a {kind}")
            values[key] = str(values[key])
    for key in ("on_unproven", "inner"):
        if key in values and not isinstance(values[key], str):
            raise OptionError(f"{key}={values[key]!r}: it must be a str")
    return Options(**values)


def for_a_program(options: Options) -> Options:
    """The options of a program that is compiled or run as it is, without a host that knows its layers.

    Raises:
        OptionError: one that such a program cannot have.
    """
    if options.tp_invariant is not None:
        raise OptionError(
            f"tp_invariant={options.tp_invariant}: a program does not say which of its products are divided over ranks, so this is an "
            "option of vLLM's engines (additional_config): leave it out, and call bi_compile.ops.mm_segments and all_reduce_tree"
        )
    return options


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise OptionError(f'passes={value!r}: it must be a list of names, as in ["{ALL}"]')
    return tuple(value)
