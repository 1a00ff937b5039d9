"""What Ascend's own kernel compiler makes of a Triton kernel, on a machine without an NPU.

Our host functions are called as they are on CPU tensors; where they would start a kernel, triton-ascend's binder makes
the same key and signature as for a real launch and stops. triton-ascend then lowers the kernel to linalg, and Huawei's
bishengir-compile plans its on-chip memory and lowers it to HIVM. Its last step, the assembler hivmc, is part of CANN and
is not here (a program that does nothing stands in its place): a HIVM module means that everything before it succeeded.

Needs triton-ascend and ascendnpu-ir (PyPI) and no upstream triton.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: generation -> the chip that bishengir-compile compiles for
CHIPS = {"A2": "Ascend910B2", "A3": "Ascend910_9391", "950": "Ascend950PR_9589"}


#: triton-ascend is not made for threads
_TRITON = threading.Lock()
#: triton-adapter-opt 3.2.0 uses freed memory: on one and the same input it crashed in 12 of 800 runs; where glibc notices first, it aborts
_TRIES, _CRASHES = 5, (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)


class _NoDevice:
    """What the binder asks of a driver."""

    def __init__(self, chip: str) -> None:
        self.chip = chip

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("npu", self.chip, 0)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as it would be compiled: `key` is that of Triton's cache, one compiled module for each."""

    kernel: Any
    key: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attrs: Any

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def linalg(self, chip: str) -> str:
        """What triton-ascend hands to bishengir-compile; once more where its compiler crashed. A refusal stands."""
        for _ in range(_TRIES):
            try:
                with _TRITON:
                    return self._linalg(chip)
            except subprocess.CalledProcessError as error:
                if error.returncode not in _CRASHES:
                    raise
                crash = error
        raise crash

    def _linalg(self, chip: str) -> str:
        a5 = chip.startswith("Ascend950")
        backend = make_backend(GPUTarget("npu", chip, 0))
        given = {"compile_on_910_95": True, "multibuffer": False, "enable_auto_bind_sub_block": False} if a5 else {}
        options = backend.parse_options(given | {"enable_select_analysis": a5})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(fn=self.kernel, signature=self.signature, constants=self.constants, attrs=self.attrs)
        module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options)
        metadata = {"hash": hashlib.sha256(self.key.encode()).hexdigest(), **options.__dict__}
        return stages["ttadapter"](stages["ttir"](module, metadata), metadata)


@contextlib.contextmanager
def captured(chip: str = CHIPS["A2"]) -> Iterator[list[Launch]]:
    """Every kernel that a host function would launch in here, instead of launching it."""
    found: list[Launch] = []

    def hook(key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(Launch(fn.jit_function, key, compile["signature"], compile["constants"], compile["configs"][0]))
        return True

    before = JITFunction.cache_hook
    JITFunction.cache_hook = hook
    driver.set_active(_NoDevice(chip))
    try:
        yield found
    finally:
        JITFunction.cache_hook = before


def compiler() -> Path:
    spec = importlib.util.find_spec("ascendnpuir")
    assert spec is not None and spec.origin is not None, "pip install ascendnpu-ir"
    path = Path(spec.origin).parent / "bin"
    for tool in path.iterdir():
        tool.chmod(0o755)  # the wheel comes without the run bit
    return path / "bishengir-compile"


@dataclasses.dataclass(frozen=True)
class Module:
    """HIVM text, or why there is none."""

    hivm: str | None
    said: str

    @property
    def refusal(self) -> str:
        found = re.search(r"error: (.*?)(?:\n|$)", self.said)
        return found.group(1) if found else self.said[-300:]


def lower(launch: Launch, chip: str) -> Module:
    """The launch's HIVM module for the chip, or the compiler's words."""
    try:
        text = launch.linalg(chip)
    except subprocess.CalledProcessError as error:
        return Module(None, error.stderr.decode())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "k.mlir").write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", text))
        multi = "false" if chip.startswith("Ascend950") else "true"
        command = [
            str(compiler()), f"{folder}/k.mlir", f"--target={chip}", f"--enable-auto-multi-buffer={multi}",
            f"--enable-auto-bind-sub-block={multi}", "--enable-hfusion-compile=true", "--enable-hivm-compile=true",
            "--enable-triton-kernel-compile=true", f"--save-temps={folder}", "-o", f"{folder}/k.o",
        ]  # fmt: skip
        for assembler in ("hivmc", "hivmc-a5"):  # without one, bishengir-compile tries everything five times
            Path(folder, assembler).symlink_to("/bin/true")
        environment = os.environ | {"PATH": f"{compiler().parent}:{folder}:{os.environ['PATH']}"}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        out = Path(folder, "module.hivm.opt.mlir")
        text = out.read_text() if out.exists() else ""
        return Module(text or None, run.stderr + run.stdout)


#: on-chip memories by their names in HIVM: unified buffer, L1, accumulators
MEMORIES = {"ub": "UB_SIZE", "cbuf": "L1_SIZE", "cc": "L0C_SIZE"}
_BITS = {"i1": 8, "i8": 8, "i16": 16, "bf16": 16, "f16": 16, "i32": 32, "f32": 32, "i64": 64, "f64": 64}


def memory(hivm: str) -> dict[str, float]:
    """The part of each memory that the plan uses, as HIVM states it: the farthest end of a buffer over the chip's size."""
    sizes = {name: int(n) for name, n in re.findall(r'"(\w+_SIZE)", (\d+) :', hivm)}
    used = dict.fromkeys(MEMORIES, 0.0)
    for function in hivm.split("func.func")[1:]:
        constants = dict(re.findall(r"(%\S+) = (?:arith.constant |llvm.mlir.constant\()(\d+) : i64", function))
        casts = re.findall(
            r"pointer_cast\(([^)]*)\)[^:]*: memref<((?:\d+x)*)(\w+), #hivm.address_space<(\w+)>>", function
        )
        assert len(casts) == len(re.findall(r"pointer_cast\(", function)), "a buffer of unknown size"
        for addresses, shape, dtype, space in casts:
            bits = math.prod(int(n) for n in shape.split("x") if n) * _BITS[dtype]
            for address in addresses.split(", "):
                used[space] = max(used[space], (int(constants[address]) * 8 + bits) / sizes[MEMORIES[space]])
    return used
