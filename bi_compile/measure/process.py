"""Each engine and each compiled model of the demonstration, the benchmark and the tests runs in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

#: one vLLM process, quiet, offline, with room for a small model's keys and values
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class ProcessFailed(RuntimeError):
    """A process that printed no RESULT line; the message is the end of what it printed."""


def python(arguments: list[str], timeout: float = 1200, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter; stdout and stderr come back as one text."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_module(
    module: str, plan: dict[str, Any], timeout: float = 1200, **environment: str
) -> tuple[dict[str, Any], str]:
    """Run `python -m module plan`; its RESULT line, read, and all that it printed.

    Raises:
        ProcessFailed: it printed none, or took longer than `timeout` seconds.
    """
    try:
        done = python(["-m", module, json.dumps(plan)], timeout, **environment)
        output, status = done.stdout, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        partly = error.stdout or b""
        output = partly.decode(errors="replace") if isinstance(partly, bytes) else partly
        status = f"no result after {timeout:.0f} s"
    return _result(module, plan, output, status), output


def _result(module: str, plan: dict[str, Any], output: str, status: str) -> dict[str, Any]:
    line = next((text for text in reversed(output.splitlines()) if text.startswith("RESULT ")), None)
    if line is None:
        tail = "\n".join(output.splitlines()[-40:])
        raise ProcessFailed(f"{sys.executable} -m {module} '{json.dumps(plan)}'\n{status}\n{tail}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def take_turns(module: str, plans: Sequence[dict[str, Any]], *, at_once: int = 1) -> list[dict[str, Any]]:
    """Run `python -m module plan` for each plan, all alive together but one at work at a time; their RESULT lines.

    A process asks for its turn by a line TURN on stdout and waits for a line on stdin: what is timed within a turn shares
    its moment of the machine with the other processes' turns of the same round. at_once: how many of the first ones start together; each of
    the others starts when those before it wait for their turn.

    Raises:
        ProcessFailed: a process printed no RESULT line.
    """
    command = [sys.executable, "-m", module]
    running: list[subprocess.Popen[str]] = []
    outputs: list[str] = []
    with ThreadPoolExecutor(at_once) as readers, contextlib.ExitStack() as stack:
        for plan in plans:
            process = subprocess.Popen(
                [*command, json.dumps({**plan, "turns": True})],
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
            if len(running) >= min(at_once, len(plans)):
                outputs += readers.map(_until_turn, running[len(outputs) :])
        waiting = [i for i, output in enumerate(outputs) if output.endswith(TURN)]
        while waiting:
            for i in list(waiting):
                process, said = running[i], ""
                if process.poll() is None:
                    assert process.stdin is not None
                    print(file=process.stdin, flush=True)
                    said = _until_turn(process)
                outputs[i] += said
                if not said.endswith(TURN):  # it ended, though it may be about to
                    waiting.remove(i)
    return [_result(module, plan, output, "") for plan, output in zip(plans, outputs, strict=True)]


TURN = "TURN\n"


def _until_turn(process: subprocess.Popen[str]) -> str:
    """What the process prints until it asks for a turn or ends."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == TURN:
            break
    return "".join(lines)


def wait_for_turn() -> None:
    """Called by a process of `take_turns`."""
    print(TURN, end="", flush=True)
    sys.stdin.readline()


@contextlib.contextmanager
def fastest_cpu() -> Iterator[None]:
    """Bind this thread to the CPU that is fastest now, of those that it may use; some three milliseconds for each to find it. Linux only.

    Two CPUs share a core. While the other one works, for another guest of the machine say, a CPU has half its speed, for milliseconds or for
    seconds, and a thread stays where it is: one of two processes may have such a CPU for as long as they are compared.
    """
    allowed = os.sched_getaffinity(0)
    seconds = dict.fromkeys(allowed, 0.0)
    try:
        for _ in range(3):
            for cpu in allowed:
                seconds[cpu] += _seconds_on(cpu)
        os.sched_setaffinity(0, {min(allowed, key=seconds.__getitem__)})
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _seconds_on(cpu: int) -> float:
    os.sched_setaffinity(0, {cpu})
    start = time.perf_counter()
    for _ in range(50_000):
        pass
    return time.perf_counter() - start
