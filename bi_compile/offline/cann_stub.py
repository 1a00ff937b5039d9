"""STAND-INS for the CANN libraries: they let the real torch_npu be imported on a machine without CANN, and compute nothing.

    python -m bi_compile.offline.cann_stub FOLDER
    LD_LIBRARY_PATH=FOLDER python -c "import torch, torch_npu; print(torch.ops.npu.npu_add_rms_norm.default._schema)"

torch_npu binds some 85 C functions of CANN when it is loaded, and looks up more by name when it starts a device. Here each
of them returns 0, which is CANN's "success"; the few that hand out memory, streams or the device's name do so from the host, and
those that run an operator, a kernel, a captured graph or a collective refuse it by its name, at the call (torch_npu's queue is off).
No operator has a kernel: use them to trace under FakeTensorMode (the offline audit, the tests), never to compute.
Needs cc, nm and strings (packages gcc and binutils).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import HostError

#: what torch_npu is linked with
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
_BOUND = re.compile(r"(acl|rt[A-Z]|Msprof|Hccl)\w+")
_LOOKED_UP = re.compile(r"(aclrt|aclsys|acldvpp|aclprof|aclmdl|aclop|acl|rt|Hccl)[A-Z]\w+")
#: the functions that have to give something; memory is the host's
_SPECIAL = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int aclrtGetDeviceCount(unsigned int *c) { *c = 1; return 0; }
int aclrtGetDevice(int *d) { *d = 0; return 0; }
const char *aclrtGetSocName(void) { const char *s = getenv("BI_COMPILE_STAND_IN_SOC"); return s ? s : "Ascend910B2"; }
int aclrtMalloc(void **p, size_t n, int f) { return posix_memalign(p, 512, n ? n : 512); }
int aclrtMallocAlign32(void **p, size_t n, int f) { return posix_memalign(p, 512, n ? n : 512); }
int aclrtMallocHost(void **p, size_t n) { return posix_memalign(p, 512, n ? n : 512); }
int aclrtFree(void *p) { free(p); return 0; }
int aclrtFreeHost(void *p) { free(p); return 0; }
int aclrtMemcpy(void *d, size_t m, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }
int aclrtMemcpyAsync(void *d, size_t m, const void *s, size_t n, int k, void *st) { memcpy(d, s, n); return 0; }
int aclrtMemset(void *d, size_t m, int v, size_t n) { memset(d, v, n); return 0; }
/* a program that profiles its memory wants to see it shrink */
int aclrtGetMemInfo(int a, size_t *f, size_t *t) { static size_t n; *t = 16ull << 30; *f = *t - (++n << 20); return 0; }
int aclrtCreateStream(void **s) { *s = malloc(8); return 0; }
int aclrtCreateStreamWithConfig(void **s, unsigned p, unsigned f) { *s = malloc(8); return 0; }
int aclrtCreateEventExWithFlag(void **s, unsigned f) { *s = malloc(8); return 0; }
int aclrtGetCurrentContext(void **s) { static int x; *s = &x; return 0; }
size_t aclGetCompileoptSize(int o) { return 64; }
int aclGetCompileopt(int o, char *v, size_t n) { memset(v, 0, n); strncpy(v, "disable", n - 1); return 0; }
char stand_in_says[256] = "a stand-in for CANN, which computes nothing";
const char *aclGetRecentErrMsg(void) { return stand_in_says; }
/* torch_npu's queue would report a refusal after the result was read, or never */
__attribute__((constructor)) static void stand_in_has_no_queue(void) { setenv("TASK_QUEUE_ENABLE", "0", 1); }
/* an operator that is really to run: its result would be memory as it lay there */
int stand_in_refuses(const char *op) {
  snprintf(stand_in_says, sizeof stand_in_says, "the stand-ins for CANN do not compute %s", op);
  fprintf(stderr, "%s\n", stand_in_says);
  return 100024; /* ACL_ERROR_OP_NOT_FOUND */
}
int aclrtMemsetAsync(void *d, size_t m, int v, size_t n, void *st) { memset(d, v, n); return 0; }
int aclrtLaunchCallback(void (*f)(void *), void *x, int b, void *st) { f(x); return 0; }
int aclrtLaunchHostFunc(void *st, void (*f)(void *), void *x) { f(x); return 0; }
int aclopCompileAndExecute(const char *op) { return stand_in_refuses(op); }
int aclopCompileAndExecuteV2(const char *op) { return stand_in_refuses(op); }
int aclopExecuteV2(const char *op) { return stand_in_refuses(op); }
"""
#: functions that would move or compute something: each refuses by its own name
_REFUSED = """
HcclAllGather HcclAllGatherV HcclAllReduce HcclAlltoAll HcclAlltoAllV HcclAlltoAllVC HcclBatchSendRecv HcclBroadcast HcclRecv HcclReduce
HcclReduceScatter HcclReduceScatterV HcclScatter HcclSend aclStft aclmdlRIAddCondTask aclmdlRIExecuteAsync aclrtLaunchKernelWithHostArgs
aclrtMemcpyAsyncWithCondition aclrtMemcpyBatch aclrtMemcpyBatchAsync aclrtValueWait aclrtValueWrite rtKernelLaunch
""".split()


def folder() -> Path:
    """Where the stand-ins for the installed torch_npu lie, built if they are not there yet.

    Raises:
        HostError: torch_npu is not installed, or a tool is missing.
    """
    npu = _package("torch_npu")
    mark = hashlib.sha256(f"{npu}{(npu / 'version.py').read_text()}{_SPECIAL}{_REFUSED}".encode()).hexdigest()[:16]
    found = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bi_compile" / f"cann-{mark}"
    if not found.is_dir():
        found.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(dir=found.parent))
        build(half)
        try:
            half.rename(found)
        except OSError:  # another process was first
            shutil.rmtree(half)
            if not found.is_dir():
                raise
    return found


def build(out: Path) -> int:
    """Write the stand-ins into the folder `out`; returns how many functions they have.

    Raises:
        HostError: torch_npu is not installed, or a tool is missing.
    """
    missing = [tool for tool in ("cc", "nm", "strings") if shutil.which(tool) is None]
    if missing:
        raise HostError(
            f"the stand-ins for CANN need {', '.join(missing)}: install gcc and binutils, or install CANN and source its set_env.sh"
        )
    npu, torch = _package("torch_npu"), _package("torch")
    binaries = [*npu.glob("lib/*.so"), *npu.glob("_C*.so")]
    there = _symbols("--defined-only", [*binaries, *(torch / "lib").glob("*.so")])
    wanted = {s for s in _symbols("--undefined-only", binaries) if _BOUND.fullmatch(s)}
    text = _output("strings", "-n", "6", str(npu / "lib" / "libtorch_npu.so"))
    wanted |= {s for s in text.split() if _LOOKED_UP.fullmatch(s)}
    special = set(re.findall(r"^(?:int|size_t|const char) \**(\w+)\(", _SPECIAL, re.MULTILINE))
    plain = sorted(wanted - there - special)
    out.mkdir(parents=True, exist_ok=True)
    source = out / "stand_in.c"
    returns = {name: f'stand_in_refuses("{name}")' for name in _REFUSED}
    source.write_text(_SPECIAL + "".join(f"int {name}() {{ return {returns.get(name, 0)}; }}\n" for name in plain))
    for name in LIBRARIES:
        library = f"lib{name}.so"
        _output("cc", "-w", "-shared", "-fPIC", "-o", str(out / library), str(source), f"-Wl,-soname,{library}")
    return len(plain) + len(special)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise HostError(f"{name} is not installed: pip install {name.replace('_', '-')} of the release that torch has")
    return Path(spec.origin).parent


def _symbols(which: str, binaries: Iterable[Path]) -> set[str]:
    lines = [line for b in binaries for line in _output("nm", "-D", which, str(b)).splitlines()]
    return {line.split()[-1].split("@")[0] for line in lines}


def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise HostError(f"building the stand-ins for CANN failed at `{' '.join(command)}`: {run.stderr.strip()}")
    return run.stdout


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(f"{build(target)} functions, stand-ins for CANN that compute nothing, in {target}")
