"""C++ of ours, compiled once on the machine that it runs on: for the same sources, flags, PyTorch and processor never again."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock


@dataclasses.dataclass(frozen=True)
class Extension:
    """A library of operators made of the C++ files in one folder.

    `depends_on` says what else a finished build depends on (the processor, CUDA's version): another text, another build.
    `include_folders` is asked before compiling and raises RuntimeError with the remedy if headers are missing.
    """

    prefix: str
    folder: Path
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    depends_on: Callable[[], str]
    ldflags: tuple[str, ...] = ()
    include_folders: Callable[[], Sequence[Path]] = list

    def name(self) -> str:
        """The library's name, different for each source, flag, PyTorch, Python and `depends_on`: no older build is loaded."""
        digest = hashlib.sha256()
        for path in sorted([*(self.folder / source for source in self.sources), *self.folder.glob("*.h")]):
            digest.update(path.read_bytes())
        for text in (*self.flags, torch.__version__, platform.python_version(), self.depends_on()):
            digest.update(text.encode())
        return f"{self.prefix}_{digest.hexdigest()[:16]}"

    def build_folder(self) -> Path:
        """Where the library is built: in TORCH_EXTENSIONS_DIR, else in ~/.cache/torch_extensions."""
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
        return Path(root) / self.name()

    def path(self) -> Path:
        """The library, once it is built."""
        return self.build_folder() / f"{self.name()}.so"

    def is_built(self) -> bool:
        """Whether a process finished building it, so that loading it needs no compiler."""
        return (self.build_folder() / "finished").exists()

    def load(self) -> None:
        """Load the operators. The first process compiles them, the others wait; later ones find the build.

        Raises:
            RuntimeError: there is no C++ compiler, no ninja or no header, or the compiler failed.
        """
        target = self.build_folder()
        finished = target / "finished"
        if not finished.exists():
            target.mkdir(parents=True, exist_ok=True)
            with FileLock(target / "flock"):  # goes with the process, unlike torch's own lock file, which
                (target / "lock").unlink(missing_ok=True)  # would make everyone wait for a process that was killed
                if not finished.exists():
                    self._compile(target)
                    finished.touch()
                    return
        torch.ops.load_library(str(self.path()))

    def _compile(self, target: Path) -> None:
        from torch.utils import (
            cpp_extension,
        )  # here: it takes a second to import, and a finished build needs none of it

        path = os.environ.get("PATH", "")
        # the ninja of a virtual environment that was not activated
        os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
        try:
            self._require_tools()
            cpp_extension.load(
                self.name(),
                [str(self.folder / source) for source in self.sources],
                extra_cflags=list(self.flags),
                extra_ldflags=list(self.ldflags),
                extra_include_paths=[str(folder) for folder in self.include_folders()],
                build_directory=str(target),
                is_python_module=False,
            )
        finally:
            os.environ["PATH"] = path

    def _require_tools(self) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        remedies = {compiler: "install g++ 12 or newer, or name a C++20 compiler in CXX", "ninja": "pip install ninja"}
        for tool, remedy in remedies.items():
            if shutil.which(tool) is None:
                raise RuntimeError(
                    f"{self.prefix} is compiled on this machine, and {tool!r} is not on the PATH: {remedy}"
                )
