"""What options name, found once: passes, target, probe file, dump folder. All that can be refused is refused here."""

from __future__ import annotations

import dataclasses
import pkgutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .audit import measured
from .errors import OptionError, meant
from .options import ALL, Options
from .passes import PASSES, InOneTree, MatmulAllreduce
from .table import Pass
from .targets import Target, get_target


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Options, and what they name."""

    options: Options
    passes: tuple[type[Pass], ...]
    target: Target | None
    """None: the device of each graph."""
    probe: Mapping[str, Any] | None
    """The content of the probe file."""


def resolve(options: Options) -> Resolved:
    """Find what `options` name. Imports modules of the user's passes, and makes the folder `dump_dir`.

    Raises:
        OptionError: a pass, target or backend that nobody knows, a probe file of another machine, a folder that cannot be
            written; the message lists what there is.
    """
    target = None if options.target is None else get_target(options.target)
    probe = None if options.probe is None else _probe(options.probe)
    passes = tuple(resolve_passes(options.passes))
    if options.tp_invariant is not None:
        passes = tuple(InOneTree if p is MatmulAllreduce else p for p in passes)
    if options.inner != "inductor":
        _check_inner(options.inner)
    if options.dump_dir is not None:
        _check_writable(Path(options.dump_dir))
    return Resolved(options, passes, target, probe)


def check_trust(trust: Mapping[str, str]) -> None:
    """To be called when the operators of a program are registered.

    Raises:
        OptionError: an entry names an operator that nobody registered.
    """
    unknown = [name for name in trust if not _is_registered(name)]
    if unknown:
        raise OptionError(
            f"trust names {', '.join(map(repr, unknown))}, which is not registered: correct it, or import what registers it first"
        )


def _is_registered(name: str) -> bool:
    """An operator as `ns::packet`, `ns::packet.overload` or `ns.packet.overload`, or a higher-order one; of a Triton kernel
    nobody knows before it is launched."""
    ns, _, packet = name.replace("::", ".", 1).partition(".")
    if ns == "triton":
        return True
    if not packet:
        return hasattr(torch.ops.higher_order, ns)
    packet, _, overload = packet.partition(".")
    found = getattr(getattr(torch.ops, ns), packet, None)
    return found is not None and (not overload or overload in found.overloads())


#: the entry points under which installed packages name passes of theirs: `mine = "package.module:Mine"`
GROUP = "bi_compile.passes"


def pass_names() -> list[str]:
    """The names that `passes` and `custom_passes` understand."""
    return [ALL, *(p.name for p in PASSES), *sorted(metadata.entry_points(group=GROUP).names)]


def resolve_passes(names: Sequence[str]) -> list[type[Pass]]:
    """The passes called `names`, each once, in that order.

    Raises:
        OptionError: a name that is unknown or cannot be imported; the message lists those that are known.
    """
    by_name = {p.name: p for p in PASSES}
    found: list[type[Pass]] = []
    for name in names:
        if name == ALL:
            found += PASSES
        elif name in by_name:
            found.append(by_name[name])
        elif ":" in name:
            found.append(_users_pass(name, name))
        elif installed := metadata.entry_points(group=GROUP, name=name):
            found.append(_users_pass(name, _only(name, installed)))
        else:
            raise OptionError(
                f'unknown pass {name!r}{meant(name, pass_names())}: known are {", ".join(pass_names())}, or "package.module:object" for one of yours'
            )
    return list(dict.fromkeys(found))


def _only(name: str, installed: Iterable[metadata.EntryPoint]) -> str:
    """What the entry points called `name` name. Raises OptionError: not all the same."""
    values = sorted({e.value for e in installed})
    if len(values) > 1:
        raise OptionError(
            f"the pass {name!r} is in several installed packages ({', '.join(values)}): write the one that is meant in full"
        )
    return values[0]


def _users_pass(name: str, path: str) -> type[Pass]:
    """The pass at "package.module:object", which goes by `name` in messages."""
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # whatever a user's module does at import
        raise OptionError(
            f'the pass {name!r} cannot be imported ({error}): known are {", ".join(pass_names())}, or "package.module:object"'
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise OptionError(f"{name!r} is {found!r}, which is not a subclass of bi_compile.Pass")
    return found


def _probe(path: str) -> Mapping[str, Any]:
    data = measured.read(path)
    why = measured.stale(data)
    if why is not None:
        raise OptionError(f"probe={path!r}: {why}")
    return data


def _check_inner(name: str) -> None:
    from torch._dynamo.backends.registry import list_backends

    known = [b for b in list_backends(exclude_tags=()) if b != ALL]
    if name == ALL:
        raise OptionError(f"inner={ALL!r} would compile each graph twice: leave inner out for Inductor")
    if name not in known:
        raise OptionError(
            f"inner={name!r}{meant(name, known)}: known are {', '.join(['inductor', *(b for b in known if b != 'inductor')])}"
        )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a name of its own: several processes may look at once
    except OSError as error:
        raise OptionError(
            f"dump_dir={str(folder)!r} cannot be written ({error.strerror}): name a folder that can"
        ) from error
